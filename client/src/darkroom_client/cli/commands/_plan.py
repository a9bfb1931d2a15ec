"""The requests of ``generate``, and the files for their images."""

import argparse
import hashlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.request import GenerationRequest
from darkroom_client.cli._inputs import inputs_of
from darkroom_client.cli.commands._names import distinct, slug

# Short seeds: they are part of file names, and people type them.
_SEED_BOUND = 2**32


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One prompt's request, and the files for its images."""

    request: GenerationRequest
    paths: tuple[Path, ...]


def plan(arguments: argparse.Namespace) -> list[PlannedRequest]:
    """The requests of the command line; raises ``ValueError`` if there are none."""
    # Pick the seeds now: file names that exist are then an error before the work.
    requests = [seeded_request(prompt, arguments) for prompt in prompts_of(arguments)]
    paths = iter(distinct(_paths(requests, arguments)))
    planned_requests = [
        PlannedRequest(request, tuple(next(paths) for _ in range(arguments.count)))
        for request in requests
    ]
    if not arguments.overwrite:
        _check_not_existing(planned_requests, record=arguments.record)
    return planned_requests


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line; raises ``ValueError`` if there are none."""
    prompts = list(_prompts(arguments))
    if not prompts:
        raise ValueError("no prompt: give some as arguments, --file FILE, or - for stdin")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}, must be at least 1")
    if arguments.request_id and len(prompts) > 1:
        raise ValueError("--request-id names one job: give one prompt")
    return prompts


def seeded_request(prompt: str, arguments: argparse.Namespace) -> GenerationRequest:
    """The request of ``prompt``, with its request id and a seed."""
    seed = secrets.randbelow(_SEED_BOUND)
    if arguments.request_id:
        # The same for each call of this id: they are one job only if their requests are equal.
        digest = hashlib.sha256(arguments.request_id.encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
    request = request_of(prompt, arguments, seed=seed)
    embed = arguments.embed_record and arguments.format is not ImageFormat.RAW_RGB
    return replace(request, request_id=arguments.request_id, embed_record=embed)


def request_of(
    prompt: str, arguments: argparse.Namespace, seed: int | None = None
) -> GenerationRequest:
    """The request of ``prompt`` with the options of the command line; ``seed`` if it has none."""
    width, height = arguments.size
    request = GenerationRequest(
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
        true_cfg_scale=arguments.true_cfg_scale,
        guidance_rescale=arguments.guidance_rescale,
        max_sequence_length=arguments.max_sequence_length,
        prompt_2=arguments.prompt_2,
        negative_prompt_2=arguments.negative_2,
        prompt_3=arguments.prompt_3,
        negative_prompt_3=arguments.negative_3,
        empty_negative_prompt=arguments.empty_negative,
        prompt_syntax=arguments.prompt_syntax,
    )
    return replace(request, **inputs_of(arguments))


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


def _check_not_existing(planned_requests: list[PlannedRequest], *, record: bool) -> None:
    for planned in planned_requests:
        for path in planned.paths:
            for taken in (path, path.with_suffix(".json")) if record else (path,):
                if taken.exists():
                    raise FileExistsError(f"{taken} exists; --overwrite replaces it")
