"""What gRPC holds against callers that send too much, too long or nothing at all."""

LONGEST_CALL_SECONDS = 3600

MAX_CONNECTIONS = 1000

MAX_PENDING_CALLS = 100_000
"""As many as all connections can have at once."""

OPTIONS = (
    # Otherwise a second server on the same port would start, and take half of the calls.
    ("grpc.so_reuseport", 0),
    # Requests are prompts and numbers: a few kilobytes at most.
    ("grpc.max_receive_message_length", 1024**2),
    # Refused from the first number on, always from the second: gRPC's own, written down.
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # Calls that wait for the event loop. By default core cancels calls at random above 1000, all of
    # them above 3000, and nobody counts them; our own admission rejects with a reason.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    # A connection's calls at once; more wait in the client. Each may hold metadata and a window.
    ("grpc.max_concurrent_streams", 100),
    # Otherwise core also counts ended streams whose memory is not freed yet, and rejects half of
    # the calls of a client that keeps 100 of them open. The limit itself holds without it.
    ("grpc.http.overload_protection", 0),
    # A stream's window stays 64 KiB until a handler reads: a measured bandwidth would raise it to
    # megabytes for each stream, also of callers without a token.
    ("grpc.http2.bdp_probe", 0),
    # Connections at once; more are closed as soon as they are accepted.
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    # Handshake timeout: drops connections that never start HTTP/2.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    # Clients behind a DNS name find servers that were added later. Running calls continue.
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", LONGEST_CALL_SECONDS * 1000),
)
