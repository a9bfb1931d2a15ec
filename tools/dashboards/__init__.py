"""The Grafana dashboards, built by code: ``python -m tools.dashboards`` writes them."""
