"""Is it well, and is it time to scale?"""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.dashboards.panels import Query, board, graph, number


def overview() -> Dashboard:
    """The first page to look at."""
    return board(
        "darkroom-overview",
        "Darkroom: overview",
        {
            "Now": [
                number("Ready", Query("min(darkroom_ready)"), unit="bool_yes_no"),
                number("Images/s", Query("sum(darkroom:images:rate5m)"), unit="ops"),
                number("p95", Query("max(darkroom:request_seconds:p95_5m)"), unit="s"),
                number("Waiting", Query("sum(darkroom_queue_depth)"), unit="none"),
                number("In the engine", Query("sum(darkroom_jobs_running)"), unit="none"),
                number("Failures", Query("max(darkroom:failures:ratio5m)"), unit="percentunit"),
            ],
            "Requests": [
                graph(
                    "Requests by outcome",
                    Query("sum by (outcome) (darkroom:requests:rate5m)", "{{outcome}}"),
                    unit="reqps",
                    stacked=True,
                ),
                graph(
                    "How long callers wait",
                    Query("darkroom:request_seconds:p50_5m", "{{model}} p50"),
                    Query("darkroom:request_seconds:p95_5m", "{{model}} p95"),
                    unit="s",
                ),
                graph(
                    "Calls by status code",
                    Query(
                        "sum by (grpc_code) (rate(grpc_server_handled_total"
                        '{grpc_service=~"darkroom.*"}[5m]))',
                        "{{grpc_code}}",
                    ),
                    unit="reqps",
                    stacked=True,
                ),
                graph(
                    "Turned away",
                    Query("darkroom:rejections:rate5m", "{{reason}}"),
                    unit="reqps",
                    description="queue_full: it is time for another server.",
                ),
            ],
            "Is it time to scale?": [
                graph(
                    "Jobs",
                    Query("sum by (model) (darkroom_queue_depth)", "{{model}} wait"),
                    Query("sum by (model) (darkroom_jobs_running)", "{{model}} in the engine"),
                    unit="none",
                    stacked=True,
                ),
                graph(
                    "Load of the engine",
                    Query("darkroom:engine_busy:ratio5m", "{{model}} busy"),
                    Query("darkroom:occupancy:ratio5m", "{{model}} rows taken"),
                    unit="percentunit",
                    description="Busy all the time and full passes: nothing is left to gain.",
                ),
            ],
        },
    )
