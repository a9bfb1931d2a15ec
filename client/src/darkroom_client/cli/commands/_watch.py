"""``darkroom watch``: follow a job, and save its images."""

import argparse
from pathlib import Path

from darkroom_client._errors import ImageWithheld
from darkroom_client._types.events import Accepted, Finished, ImageReady
from darkroom_client._types.image import Image
from darkroom_client.cli._connect import connect
from darkroom_client.cli.commands._names import slug
from darkroom_client.cli.commands._results import report, save
from darkroom_client.cli.terminal._console import open_console
from darkroom_client.cli.terminal._display import Display, PromptBars


def run(arguments: argparse.Namespace) -> int:
    """Show the job's progress, save each image when it arrives, and report."""
    display = Display(
        open_console(),
        images=1,
        shown=not arguments.json,
        preview=False,
        picture=arguments.picture,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with display:
        _follow(arguments, display)
    return 0


def _follow(arguments: argparse.Namespace, display: Display) -> None:
    paths: dict[int, Path] = {}
    withheld: ImageWithheld | None = None
    bars: PromptBars | None = None
    with connect(arguments) as client, client.watch(arguments.request_id) as stream:
        for event in stream:
            if isinstance(event, Accepted):
                bars = PromptBars(display, event.request_id, len(event.seeds))
            if bars is not None:
                bars.show(event)
            match event:
                case ImageReady(image_index=index, image=image):
                    paths[index] = _path(image, arguments.output)
                    try:
                        save(paths[index], image, arguments)
                    except ImageWithheld as error:
                        withheld = error
                case Finished(result=result):
                    report(
                        tuple(paths[index] for index in sorted(paths)), result, arguments, display
                    )
    if withheld is not None:
        raise withheld


def _path(image: Image, folder: Path) -> Path:
    suffix = image.format.suffixes[0]
    return folder / f"{slug(image.replay.request.prompt)}-{image.seed}{suffix}"
