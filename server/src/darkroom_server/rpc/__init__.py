"""The gRPC door: converts between protobuf and the service layer, nothing else."""
