"""The gRPC side of a server."""
