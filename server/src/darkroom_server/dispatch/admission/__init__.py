"""Which jobs and calls are accepted: availability, limits, quotas, deadlines."""
