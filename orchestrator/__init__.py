"""The brain and the front door: core, policies, gateways, admin API and command line."""
