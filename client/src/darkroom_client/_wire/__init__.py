"""Conversion between the client's plain data and protobuf messages."""
