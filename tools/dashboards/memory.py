"""Who holds this memory, and will it fit?"""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.dashboards.panels import Query, board, graph


def memory() -> Dashboard:
    """Memory, by who holds it."""
    return board(
        "darkroom-memory",
        "Darkroom: memory",
        {
            "Devices": [
                graph(
                    "Memory of the devices",
                    Query("darkroom_gpu_memory_bytes", "{{device}} {{kind}}"),
                    unit="bytes",
                    description="reserved less allocated is what the allocator keeps for later; "
                    "device_used less reserved is what others hold.",
                ),
                graph(
                    "Part of the device that is free",
                    Query("darkroom:memory_free:ratio", "{{device}}"),
                    unit="percentunit",
                ),
                graph(
                    "Utilisation",
                    Query("darkroom_gpu_utilisation_ratio", "{{device}}"),
                    unit="percentunit",
                ),
                graph("Power", Query("darkroom_gpu_power_watts", "{{device}}"), unit="watt"),
                graph(
                    "Temperature",
                    Query("darkroom_gpu_temperature_celsius", "{{device}}"),
                    unit="celsius",
                ),
                graph(
                    "Resident memory of the processes",
                    Query("darkroom_host_memory_bytes", "{{process}} {{device}}"),
                    unit="bytes",
                ),
            ],
            "Models": [
                graph(
                    "Weights",
                    Query("darkroom_model_memory_bytes", "{{model}} {{component}}"),
                    unit="bytes",
                    stacked=True,
                ),
                graph(
                    "Highest peak of a pass, besides the weights",
                    Query(
                        "darkroom_peak_memory_bytes", "{{model}} {{size_class}} px, {{rows}} rows"
                    ),
                    unit="bytes",
                ),
                graph(
                    "Highest peak of a decode, besides the weights",
                    Query("darkroom_decode_peak_memory_bytes", "{{model}} {{size_class}} px"),
                    unit="bytes",
                ),
                graph(
                    "Out of memory",
                    Query(
                        "sum by (model, outcome) (increase(darkroom_out_of_memory_total[5m]))",
                        "{{model}} {{outcome}}",
                    ),
                    unit="none",
                ),
            ],
        },
    )
