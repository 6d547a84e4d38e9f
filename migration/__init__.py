"""Which package moves a running request from one engine to another? This one: the protocol, its shell and its
carriers.
"""
