"""Shows a short run through a real Prometheus: ``make observe``."""
