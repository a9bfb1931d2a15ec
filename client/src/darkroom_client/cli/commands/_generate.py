"""``darkroom generate``: prompts in, image files out."""

import argparse
import asyncio
import dataclasses
import json
import sys
from contextlib import aclosing
from pathlib import Path

from darkroom_client._async_client import AsyncClient
from darkroom_client._batch import run_paced
from darkroom_client._errors import DarkroomError, ImageWithheld
from darkroom_client._files import write_atomically
from darkroom_client._protocol.pacing import BatchPacer, is_not_now
from darkroom_client._settings import DEFAULT_RETRY
from darkroom_client._types.events import Finished, ImageReady
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult
from darkroom_client.cli._connect import connect_async
from darkroom_client.cli._exit_codes import exit_code
from darkroom_client.cli.commands._plan import PlannedRequest, plan
from darkroom_client.cli.terminal._console import open_console
from darkroom_client.cli.terminal._display import Display

UNATTENDED_SECONDS = 600.0
"""The time limit of a prompt without a terminal: nobody sees what it waits for."""

_PREVIEW_EVERY = 2


def run(arguments: argparse.Namespace) -> int:
    """Generate the images of every prompt, save each when it arrives, and report."""
    if arguments.concurrency < 1:
        raise ValueError(f"--concurrency is {arguments.concurrency}, must be at least 1")
    planned_requests = plan(arguments)
    console = open_console()
    if arguments.timeout is None and not console.is_terminal:
        arguments.timeout = UNATTENDED_SECONDS
    display = Display(
        console,
        images=sum(len(planned.paths) for planned in planned_requests),
        shown=not arguments.json,
        preview=arguments.preview,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with display:
        failures = asyncio.run(_generate_all(planned_requests, arguments, display))
    if arguments.record and not arguments.exact:
        print(
            "darkroom: a replay may differ in the last bits; generate with --exact to make it "
            "byte-equal",
            file=sys.stderr,
        )
    for index in sorted(failures):
        print(
            f"darkroom: {planned_requests[index].request.prompt!r}: {failures[index]}",
            file=sys.stderr,
        )
    return exit_code(failures[min(failures)]) if failures else 0


async def _generate_all(
    planned_requests: list[PlannedRequest], arguments: argparse.Namespace, display: Display
) -> dict[int, DarkroomError]:
    """Return the errors, by the index of their prompts."""
    failures: dict[int, DarkroomError] = {}
    pacer = BatchPacer(arguments.concurrency, arguments.timeout, DEFAULT_RETRY)
    async with connect_async(arguments) as client:

        async def run(planned: PlannedRequest) -> None:
            try:
                await _generate(client, planned, arguments, display)
            except DarkroomError as error:
                if is_not_now(error, arguments.timeout):
                    display.show_wait(error.reason or error.code, error.retry_after)
                raise
            display.end_wait()

        answers = run_paced(run, planned_requests, pacer)
        async with aclosing(answers):
            async for index, answer in answers:
                planned = planned_requests[index]
                display.advance(len(planned.paths))
                if answer is None:
                    continue
                failures[index] = answer
                if arguments.json:
                    _print_json({"prompt": planned.request.prompt, "error": _error_json(answer)})
    return failures


async def _generate(
    client: AsyncClient, planned: PlannedRequest, arguments: argparse.Namespace, display: Display
) -> None:
    every = _PREVIEW_EVERY if arguments.preview else 0
    withheld: ImageWithheld | None = None
    with display.follow(planned.request.prompt, len(planned.paths)) as bars:
        async with client.stream(planned.request, preview_every=every) as stream:
            async for event in stream:
                bars.show(event)
                match event:
                    case ImageReady(image_index=index, image=image):
                        try:
                            _save(planned.paths[index], image, arguments)
                        except ImageWithheld as error:
                            withheld = error
                    case Finished(result=result):
                        _report(planned.paths, result, arguments, display)
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
            _print_json(_image_json(path, image, result))
            continue
        stages = dataclasses.asdict(result.timings)
        seconds = "  ".join(f"{stage} {value:.3f}" for stage, value in stages.items())
        cut = "  (the prompt's end was ignored: it is too long)" if image.prompt_truncated else ""
        display.print(str(path), f"  seed {image.seed}  {seconds} s{cut}")


def _image_json(path: Path, image: Image, result: GenerationResult) -> dict[str, object]:
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


def _error_json(error: DarkroomError) -> dict[str, object]:
    return {
        "message": str(error),
        "kind": type(error).__name__,
        "code": error.code,
        "reason": error.reason,
        "request_id": error.request_id,
        "retry_after": error.retry_after,
    }


def _print_json(value: object) -> None:
    # Flush, so the next program in a pipe can begin with the first image.
    print(json.dumps(value), flush=True)
