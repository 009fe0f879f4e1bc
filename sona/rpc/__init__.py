"""gRPC: parse, delegate, convert. One error table, one server."""
