"""Which prompts to draw, and where their images go."""

import argparse
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.request import GenerationRequest
from darkroom_client.cli.commands._names import distinct, slug

# Short seeds, because they stand in file names and people type them again.
_SEED_BOUND = 2**32


@dataclass(frozen=True, slots=True)
class Drawing:
    """One prompt's request, and where its images go."""

    request: GenerationRequest
    paths: tuple[Path, ...]


def plan(arguments: argparse.Namespace) -> list[Drawing]:
    """What ``generate`` was told to draw; raises ``ValueError`` where that is nothing."""
    prompts = list(_prompts(arguments))
    if not prompts:
        raise ValueError("no prompt: give some as arguments, --file FILE, or - for stdin")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}, must be at least 1")
    requests = [
        # A seed is drawn here already: file names that are taken are noticed before the work.
        as_asked(prompt, arguments, seed=secrets.randbelow(_SEED_BOUND))
        for prompt in prompts
    ]
    paths = iter(distinct(_paths(requests, arguments)))
    drawings = [
        Drawing(request, tuple(next(paths) for _ in range(arguments.count))) for request in requests
    ]
    if not arguments.overwrite:
        _refuse_existing(drawings, record=arguments.record)
    return drawings


def as_asked(
    prompt: str, arguments: argparse.Namespace, seed: int | None = None
) -> GenerationRequest:
    """The request of ``prompt`` with the options of the command line, else with ``seed``."""
    width, height = arguments.size
    return GenerationRequest(
        prompt=prompt,
        model=arguments.model,
        negative_prompt=arguments.negative,
        width=width,
        height=height,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        seed=seed if arguments.seed is None else arguments.seed,
        image_count=arguments.count,
        scheduler=arguments.scheduler,
        format=arguments.format,
        quality=arguments.quality,
        exact=arguments.exact,
    )


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    lines: list[str] = []
    if arguments.file is not None:
        lines = arguments.file.read_text(encoding="utf-8").splitlines()
    for prompt in arguments.prompts:
        lines.extend(sys.stdin.read().splitlines() if prompt == "-" else [prompt])
    return (line.strip() for line in lines if line.strip())


def _paths(requests: list[GenerationRequest], arguments: argparse.Namespace) -> Iterator[Path]:
    suffix = ImageFormat(arguments.format).suffixes[0]
    for request in requests:
        for index in range(arguments.count):
            seed = ((request.seed or 0) + index) % 2**63
            yield arguments.output / f"{slug(request.prompt)}-{seed}{suffix}"


def _refuse_existing(drawings: list[Drawing], *, record: bool) -> None:
    for drawing in drawings:
        for path in drawing.paths:
            for taken in (path, path.with_suffix(".json")) if record else (path,):
                if taken.exists():
                    raise FileExistsError(f"{taken} exists; --overwrite replaces it")
