"""How well are the passes filled, and what was wasted?"""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.dashboards.panels import Query, board, graph


def engine() -> Dashboard:
    """The engine's passes, and what went wrong in it."""
    return board(
        "darkroom-engine",
        "Darkroom: engine",
        {
            "Passes": [
                graph(
                    "Mean seconds of a step, by rows",
                    Query("darkroom:step_seconds:mean5m", "{{model}} {{rows}} rows"),
                    unit="s",
                ),
                graph(
                    "Rows of a pass",
                    Query("darkroom:rows_per_step:mean5m", "{{model}}"),
                    unit="none",
                ),
                graph(
                    "Occupancy",
                    Query("darkroom:occupancy:ratio5m", "{{model}}"),
                    unit="percentunit",
                    description="Rows of a pass, over those that it could have held.",
                ),
                graph(
                    "Steps and joins",
                    Query("sum by (model) (rate(darkroom_steps_total[5m]))", "{{model}} steps"),
                    Query("sum by (model) (rate(darkroom_joins_total[5m]))", "{{model}} joins"),
                    unit="ops",
                ),
            ],
            "Waste": [
                graph(
                    "Part of the passes for jobs that were given up",
                    Query("darkroom:wasted:ratio5m", "{{model}}"),
                    unit="percentunit",
                ),
                graph(
                    "Cancels, by how far the job had come",
                    Query("sum by (phase) (rate(darkroom_cancels_total[5m]))", "{{phase}}"),
                    unit="ops",
                    stacked=True,
                ),
                graph(
                    "Prompts that were remembered",
                    Query("darkroom:prompt_hits:ratio5m", "{{model}}"),
                    unit="percentunit",
                ),
                graph(
                    "Retries that joined, and prompts cut short",
                    Query(
                        "sum by (model) (rate(darkroom_retries_joined_total[5m]))",
                        "{{model}} joined",
                    ),
                    Query(
                        "sum by (model) (rate(darkroom_prompt_truncations_total[5m]))",
                        "{{model}} cut short",
                    ),
                    unit="ops",
                ),
            ],
            "Faults": [
                graph(
                    "Engines restarted, jobs run again",
                    Query("increase(darkroom_engine_restarts_total[5m])", "restarts"),
                    Query("darkroom_engines_given_up", "given up"),
                    Query(
                        "sum by (model) (increase(darkroom_job_replays_total[5m]))",
                        "{{model}} run again",
                    ),
                    unit="none",
                ),
                graph(
                    "Decodes that were not numbers",
                    Query(
                        "sum by (model, outcome) (increase(darkroom_non_finite_decodes_total[5m]))",
                        "{{model}} {{outcome}}",
                    ),
                    unit="none",
                ),
                graph(
                    "Seconds to load and to warm up",
                    Query("darkroom_model_load_seconds", "{{model}} load"),
                    Query("darkroom_model_warm_up_seconds", "{{model}} warm up"),
                    unit="s",
                ),
            ],
        },
    )
