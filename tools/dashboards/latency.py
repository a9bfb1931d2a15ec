"""Where did this second go?"""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.dashboards.panels import Query, board, graph


def latency() -> Dashboard:
    """Latency by stage."""
    return board(
        "darkroom-latency",
        "Darkroom: latency by stage",
        {
            "Requests": [
                graph(
                    "Mean seconds of a request, by stage",
                    Query("darkroom:stage_seconds:mean5m", "{{model}} {{stage}}"),
                    unit="s",
                    stacked=True,
                    description="The stages add up to the time that a caller waits.",
                ),
                graph(
                    "Seconds from request to answer",
                    *(
                        Query(
                            f"histogram_quantile({quantile}, sum by (le) "
                            "(rate(darkroom_request_seconds_bucket[5m])))",
                            f"p{quantile * 100:g}",
                        )
                        for quantile in (0.5, 0.95, 0.99)
                    ),
                    unit="s",
                    exemplars=True,
                    description="The dots are single requests, with the ids of their traces.",
                ),
                graph(
                    "p95 by stage",
                    Query(
                        "histogram_quantile(0.95, sum by (stage, le) "
                        "(rate(darkroom_stage_seconds_bucket[5m])))",
                        "{{stage}}",
                    ),
                    unit="s",
                ),
                graph(
                    "First preview",
                    Query(
                        "histogram_quantile(0.95, sum by (model, le) "
                        "(rate(darkroom_time_to_first_preview_seconds_bucket[5m])))",
                        "{{model}} p95",
                    ),
                    unit="s",
                ),
            ],
            "Promises": [
                graph(
                    "Deadlines missed, by how far the request had come",
                    Query("sum by (phase) (rate(darkroom_deadline_misses_total[5m]))", "{{phase}}"),
                    unit="reqps",
                    stacked=True,
                ),
                graph(
                    "Time taken, over the estimate",
                    *(
                        Query(
                            f"histogram_quantile({quantile}, sum by (le) "
                            "(rate(darkroom_estimate_error_ratio_bucket[5m])))",
                            f"p{quantile * 100:g}",
                        )
                        for quantile in (0.1, 0.5, 0.9)
                    ),
                    unit="none",
                    description="1 is an estimate that came true.",
                ),
            ],
        },
    )
