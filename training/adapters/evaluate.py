"""Judges what ships with the demo model: `python -m training.adapters.evaluate FOLDER`.

Starts a server with the adapters of the folder, sends 50 requests of each kind and their controls
all at once, and writes `evaluation.json` and the card into the folder.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from darkroom_client import Client, DarkroomError, GenerationRequest
from training.adapters.card import write_card
from training.adapters.trials import KINDS, Trial, trials
from training.evaluate import contact_sheet

PROMPTS = 50
STEPS = 8
GOAL = 0.75
"""The least share of right pictures, of every kind."""

MOST_CONTROLS = 0.1
"""The greatest share of controls with a right picture, of every kind."""

_SECONDS = 600.0
_AT_ONCE = 32


def generate(client: Client, requests: Sequence[GenerationRequest], steps: int) -> list[Tensor]:
    """Generate all pictures at once; each is (3, h, w) in 0..255. Raises the first error."""
    pictures = []
    for answer in client.generate_many(
        requests, concurrency=_AT_ONCE, steps=steps, timeout=_SECONDS
    ):
        if isinstance(answer, DarkroomError):
            raise answer
        pixels = torch.from_numpy(np.array(answer.image.to_pil()))
        pictures.append(pixels.permute(2, 0, 1).float())
    return pictures


def shares(judged: Sequence[Trial], pictures: Sequence[Tensor]) -> dict[str, float]:
    """Return the shares of right pictures; `pictures` are as `requests_of` orders them."""
    count = len(judged)
    right = [trial.is_right(p) for trial, p in zip(judged, pictures[::2], strict=True)]
    controls = [trial.is_right(p) for trial, p in zip(judged, pictures[1::2], strict=True)]
    return {"right": sum(right) / count, "controls": sum(controls) / count}


def requests_of(judged: Sequence[Trial]) -> list[GenerationRequest]:
    """Return the request of each trial, followed by its control's."""
    return [request for trial in judged for request in (trial.request, trial.control)]


@contextmanager
def demo_server(adapters: Path) -> Iterator[Client]:
    """A client of a server that has the demo model with the adapters of a folder."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "darkroom_server", "serve", "--port", str(port)]
    command += ["--metrics-port", "0", "--lora-dir", str(adapters / "loras")]
    command += [f"--controlnet=position={adapters / 'controlnets' / 'position'}"]
    with subprocess.Popen(command) as server:
        try:
            with Client(f"127.0.0.1:{port}", insecure=True, timeout=_SECONDS) as client:
                client.wait_until_ready(_SECONDS)
                yield client
        finally:
            server.terminate()


def main() -> None:
    """Parse the command line, judge, and write the results into the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m training.adapters.evaluate"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--no-card", action="store_true", help="print only, write nothing")
    options = parser.parse_args()

    judged = {kind: trials(kind, options.prompts) for kind in options.kinds}
    # All kinds together, so that they share batches.
    requests = [request for each in judged.values() for request in requests_of(each)]
    with demo_server(options.folder) as client:
        pictures = generate(client, requests, options.steps)
    results = {}
    for number, (kind, each) in enumerate(judged.items()):
        mine = pictures[2 * options.prompts * number :][: 2 * options.prompts]
        results[kind] = shares(each, mine)
        print(f"{kind}: {results[kind]}", flush=True)
        if options.sheets is not None:
            options.sheets.mkdir(parents=True, exist_ok=True)
            name = kind.replace(" ", "-")
            contact_sheet(torch.stack(mine)).save(options.sheets / f"{name}.png")
    if options.no_card:
        return
    evaluation = {"prompts": options.prompts, "steps": options.steps, "kinds": results}
    text = json.dumps(evaluation, indent=2) + "\n"
    (options.folder / "evaluation.json").write_text(text, "utf-8")
    write_card(options.folder)


if __name__ == "__main__":
    main()
