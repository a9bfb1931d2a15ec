"""``darkroom generate``: prompts in, image files out."""

import argparse
import dataclasses
import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom_client._errors import DarkroomError, ImageWithheld
from darkroom_client._files import write_atomically
from darkroom_client._image import Image
from darkroom_client._request import GenerationRequest
from darkroom_client._result import GenerationResult
from darkroom_client.cli._connect import connect
from darkroom_client.cli._console import open_console, print_line, progress_bar
from darkroom_client.cli._exit_codes import exit_code
from darkroom_client.cli._names import distinct, slug

if TYPE_CHECKING:
    import rich.console

# Short seeds, because they stand in file names and people type them again.
_SEED_BOUND = 2**32


@dataclass(frozen=True, slots=True)
class Drawing:
    """One prompt's request, and where its images go."""

    request: GenerationRequest
    paths: tuple[Path, ...]


def run(arguments: argparse.Namespace) -> int:
    """Draw every prompt, save each image as it arrives, and report."""
    drawings = _plan(arguments)
    if not arguments.overwrite:
        _refuse_existing(drawings, record=arguments.record)
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = open_console()
    failures: dict[int, DarkroomError] = {}
    with connect(arguments) as client, progress_bar(console, shown=not arguments.json) as bar:
        task = bar.add_task("drawing", total=sum(len(drawing.paths) for drawing in drawings))

        def done(index: int, answer: GenerationResult | DarkroomError) -> None:
            drawing = drawings[index]
            try:
                _save(drawing, answer, arguments, console)
            except DarkroomError as error:
                failures[index] = error
                if arguments.json:
                    _print_json({"prompt": drawing.request.prompt, "error": _plain(error)})
            bar.advance(task, len(drawing.paths))

        client.generate_many(
            [drawing.request for drawing in drawings],
            concurrency=arguments.concurrency,
            on_done=done,
        )
    for index in sorted(failures):
        print(f"darkroom: {drawings[index].request.prompt!r}: {failures[index]}", file=sys.stderr)
    return exit_code(failures[min(failures)]) if failures else 0


def _plan(arguments: argparse.Namespace) -> list[Drawing]:
    prompts = list(_prompts(arguments))
    if not prompts:
        raise ValueError("no prompt: give some as arguments, --file FILE, or - for stdin")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}, must be at least 1")
    width, height = arguments.size
    requests = [
        GenerationRequest(
            prompt=prompt,
            model=arguments.model,
            negative_prompt=arguments.negative,
            width=width,
            height=height,
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            # Drawn here already: file names that are taken are noticed before the work is done.
            seed=secrets.randbelow(_SEED_BOUND) if arguments.seed is None else arguments.seed,
            image_count=arguments.count,
            scheduler=arguments.scheduler,
            format=arguments.format,
            quality=arguments.quality,
            exact=arguments.exact,
        )
        for prompt in prompts
    ]
    paths = iter(distinct(_paths(requests, arguments)))
    return [
        Drawing(request, tuple(next(paths) for _ in range(arguments.count))) for request in requests
    ]


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    lines: list[str] = []
    if arguments.file is not None:
        lines = arguments.file.read_text(encoding="utf-8").splitlines()
    for prompt in arguments.prompts:
        lines.extend(sys.stdin.read().splitlines() if prompt == "-" else [prompt])
    return (line.strip() for line in lines if line.strip())


def _paths(requests: list[GenerationRequest], arguments: argparse.Namespace) -> Iterator[Path]:
    suffix = arguments.format.suffixes[0]
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


def _save(
    drawing: Drawing,
    answer: GenerationResult | DarkroomError,
    arguments: argparse.Namespace,
    console: "rich.console.Console",
) -> None:
    if isinstance(answer, DarkroomError):
        raise answer
    withheld: ImageWithheld | None = None
    for path, image in zip(drawing.paths, answer.images, strict=True):
        try:
            image.save(path, overwrite=arguments.overwrite)
        except ImageWithheld as error:
            withheld = error
            continue
        if arguments.record:
            record = image.replay.to_json().encode()
            write_atomically(path.with_suffix(".json"), record, overwrite=arguments.overwrite)
        _report(path, image, answer, arguments, console)
    if withheld is not None:
        raise withheld


def _report(
    path: Path,
    image: Image,
    result: GenerationResult,
    arguments: argparse.Namespace,
    console: "rich.console.Console",
) -> None:
    stages = dataclasses.asdict(result.timings)
    if arguments.json:
        _print_json(
            {
                "path": str(path),
                "prompt": image.replay.request.prompt,
                "seed": image.seed,
                "width": image.width,
                "height": image.height,
                "prompt_truncated": image.prompt_truncated,
                "pixels_sha256": image.replay.pixels_sha256,
                "request_id": result.request_id,
                "model": result.model,
                "model_revision": result.model_revision,
                "seconds": stages,
            },
        )
        return
    seconds = "  ".join(f"{stage} {value:.3f}" for stage, value in stages.items())
    cut = "  (the prompt's end was ignored: it is too long)" if image.prompt_truncated else ""
    print_line(console, str(path), f"  seed {image.seed}  {seconds} s{cut}", "bold")


def _plain(error: DarkroomError) -> dict[str, object]:
    return {
        "message": str(error),
        "kind": type(error).__name__,
        "code": error.code,
        "reason": error.reason,
        "request_id": error.request_id,
        "retry_after": error.retry_after,
    }


def _print_json(value: object) -> None:
    # At once, so that the next program in a pipe can begin with the first image.
    print(json.dumps(value), flush=True)
