"""The gRPC admin API: service, conversion and client."""
