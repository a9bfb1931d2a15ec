"""``darkroom generate``: prompts in, image files out."""

import argparse
import asyncio
import sys
from contextlib import aclosing

from darkroom_client._async_client import AsyncClient
from darkroom_client._batch import run_paced
from darkroom_client._errors import DarkroomError, ImageWithheld
from darkroom_client._protocol.pacing import BatchPacer, is_not_now
from darkroom_client._settings import DEFAULT_RETRY
from darkroom_client._types.events import Finished, ImageReady
from darkroom_client.cli._connect import connect_async
from darkroom_client.cli._exit_codes import exit_code
from darkroom_client.cli._flags import message
from darkroom_client.cli.commands._plan import PlannedRequest, plan
from darkroom_client.cli.commands._results import error_json, print_json, report, save
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
        picture=arguments.picture,
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
            f"darkroom: {planned_requests[index].request.prompt!r}: {message(failures[index])}",
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
                    print_json({"prompt": planned.request.prompt, "error": error_json(answer)})
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
                            save(planned.paths[index], image, arguments)
                        except ImageWithheld as error:
                            withheld = error
                    case Finished(result=result):
                        report(planned.paths, result, arguments, display)
    if withheld is not None:
        raise withheld
