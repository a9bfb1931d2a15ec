"""The gRPC face of the server: protobuf in, core's dataclasses inside, protobuf out."""
