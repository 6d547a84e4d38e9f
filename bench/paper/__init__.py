"""Which experiments of whose papers are done again here?"""
