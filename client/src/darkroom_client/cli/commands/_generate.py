"""``darkroom generate``: prompts in, image files out."""

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from darkroom_client._async_client import AsyncClient
from darkroom_client._errors import DarkroomError, ImageWithheld
from darkroom_client._files import write_atomically
from darkroom_client._types.events import Finished, ImageReady
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult
from darkroom_client.cli._connect import connect_async
from darkroom_client.cli._exit_codes import exit_code
from darkroom_client.cli.commands._plan import Drawing, plan
from darkroom_client.cli.terminal._console import open_console
from darkroom_client.cli.terminal._display import Display

_PREVIEW_EVERY = 2


def run(arguments: argparse.Namespace) -> int:
    """Draw every prompt, save each image as it arrives, and report."""
    if arguments.concurrency < 1:
        raise ValueError(f"--concurrency is {arguments.concurrency}, must be at least 1")
    drawings = plan(arguments)
    console = open_console()
    display = Display(
        console,
        images=sum(len(drawing.paths) for drawing in drawings),
        shown=not arguments.json,
        preview=arguments.preview,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with display:
        failures = asyncio.run(_draw_all(drawings, arguments, display))
    for index in sorted(failures):
        print(f"darkroom: {drawings[index].request.prompt!r}: {failures[index]}", file=sys.stderr)
    return exit_code(failures[min(failures)]) if failures else 0


async def _draw_all(
    drawings: list[Drawing], arguments: argparse.Namespace, display: Display
) -> dict[int, DarkroomError]:
    """The failures, by the place of their prompts."""
    failures: dict[int, DarkroomError] = {}
    waiting = iter(enumerate(drawings))

    async def work(client: AsyncClient) -> None:
        for index, drawing in waiting:
            try:
                await _draw(client, drawing, arguments, display)
            except DarkroomError as error:
                failures[index] = error
                if arguments.json:
                    _print_json({"prompt": drawing.request.prompt, "error": _plain(error)})

    try:
        async with connect_async(arguments) as client, asyncio.TaskGroup() as workers:
            for _ in range(min(arguments.concurrency, len(drawings))):
                workers.create_task(work(client))
    except ExceptionGroup as several:
        # A disk that is full, say: to be told of it once is enough.
        raise several.exceptions[0] from None
    return failures


async def _draw(
    client: AsyncClient, drawing: Drawing, arguments: argparse.Namespace, display: Display
) -> None:
    every = _PREVIEW_EVERY if arguments.preview else 0
    withheld: ImageWithheld | None = None
    with display.follow(drawing.request.prompt, len(drawing.paths)) as followed:
        async with client.stream(drawing.request, preview_every=every) as stream:
            async for event in stream:
                followed.show(event)
                match event:
                    case ImageReady(image_index=index, image=image):
                        try:
                            _save(drawing.paths[index], image, arguments)
                        except ImageWithheld as error:
                            withheld = error
                    case Finished(result=result):
                        _report(drawing.paths, result, arguments, display)
    if withheld is not None:
        raise withheld


def _save(path: Path, image: Image, arguments: argparse.Namespace) -> None:
    image.save(path, overwrite=arguments.overwrite)
    if arguments.record:
        record = image.replay.to_json().encode()
        write_atomically(path.with_suffix(".json"), record, overwrite=arguments.overwrite)


def _report(
    paths: tuple[Path, ...],
    result: GenerationResult,
    arguments: argparse.Namespace,
    display: Display,
) -> None:
    for path, image in zip(paths, result.images, strict=True):
        if image.flagged:
            continue
        if arguments.json:
            _print_json(_described(path, image, result))
            continue
        stages = dataclasses.asdict(result.timings)
        seconds = "  ".join(f"{stage} {value:.3f}" for stage, value in stages.items())
        cut = "  (the prompt's end was ignored: it is too long)" if image.prompt_truncated else ""
        display.print(str(path), f"  seed {image.seed}  {seconds} s{cut}")


def _described(path: Path, image: Image, result: GenerationResult) -> dict[str, object]:
    return {
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
        "seconds": dataclasses.asdict(result.timings),
    }


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
