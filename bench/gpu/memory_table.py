"""The table of ``python -m bench.micro memory``, as a phase."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bench.gpu.phases import Figures, Plan
from bench.gpu.report import COMMAND
from bench.micro.memory import BENCHMARK, STEPS, settings_costs
from bench.report.benchmark import Measurement


def memory(results: Path, docs: Path, note: str, plan: Plan) -> Iterator[Figures]:
    """Seconds and peak memory of each preset; the table has results and a section of its own."""
    costs, facts = [], {}
    for cost, model in settings_costs(plan.sd14_source().location, plan.images):
        costs.append(asdict(cost))
        facts[cost.setting] = model
        yield {"costs": costs}
    found = Measurement(
        figures={"costs": costs},
        model=facts,
        settings={"steps": STEPS, "command": COMMAND},
        gpu=torch.cuda.get_device_name(),
    )
    BENCHMARK.publish(found, Namespace(images=plan.images, results=results, docs=docs, note=note))
