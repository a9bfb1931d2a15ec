"""Trains what ships with the demo model: `python -m training.adapters.train FOLDER`.

Trains the LoRA adapters, then the ControlNet. The defaults take some minutes on two CPU cores. The
same seed and steps give the same pictures in the same order; the weights may still differ in their
last bits between machines.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch

from training.adapters.control import train_controlnet
from training.adapters.lora import train_lora
from training.adapters.styles import STYLES

MODEL = Path(str(files("darkroom_server") / "demo_model"))
CONTROLNET = "position"
STEPS = {"night": 240, "outline": 600, CONTROLNET: 400}
"""Batches for each adapter, which are trained in this order."""

FACTS = "training.json"
"""The file that records how the adapters were trained."""


def main() -> None:
    """Parse the command line, and train the adapters one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m training.adapters.train")
    parser.add_argument("folder", type=Path, help="where to write the adapters")
    parser.add_argument("--model", type=Path, default=MODEL, help="the demo model's folder")
    parser.add_argument("--only", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="batches for each, in place of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = options.folder / FACTS
    facts = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for name in options.only:
        steps = options.steps or STEPS[name]
        if name == CONTROLNET:
            target = options.folder / "controlnets" / name
            minutes = train_controlnet(options.model, steps, options.seed, target)
        else:
            target = options.folder / "loras"
            minutes = train_lora(name, options.model, STYLES[name], steps, options.seed, target)
        facts[name] = {
            "seed": options.seed,
            "steps": steps,
            "threads": options.threads,
            "minutes": round(minutes, 1),
        }
        record.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
