"""A server, a real Prometheus, a short load: ``python -m tools.observe``, or ``make observe``."""
