"""``darkroom replay``: reproduce a recorded image, and check that it is the same."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.image import Image
from darkroom_client._types.replay import ReplayRecord
from darkroom_client.cli._connect import connect
from darkroom_client.cli._exit_codes import DIFFERENT, NEARLY_SAME
from darkroom_client.cli.commands._difference import difference
from darkroom_client.cli.terminal._console import open_console, print_line

if TYPE_CHECKING:
    import rich.console


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if the pixels are identical; if not, print what differs and return 9 or 1."""
    record = ReplayRecord.from_file(arguments.record)
    _check_output(arguments, record)
    with connect(arguments) as client:
        image = client.replay(record, images=arguments.input).images[0]
    if arguments.output is not None:
        image.save(arguments.output, overwrite=arguments.overwrite)
    console = open_console()
    if image.replay.pixels_sha256 and image.replay.pixels_sha256 == record.pixels_sha256:
        rest = f"  seed {image.seed}  sha256 {record.pixels_sha256}"
        print_line(console, "identical", rest, "bold green")
        return 0
    code = _print_difference(console, record, arguments.record, image)
    for name, (then, now) in record.differences(image.replay).items():
        console.print(f"  {name}: {then} -> {now}")
    if not record.request.exact:
        console.print(
            "  (generated without --exact: the last bits may depend on the server's load)"
        )
    return code


def _print_difference(
    console: "rich.console.Console", record: ReplayRecord, path: Path, image: Image
) -> int:
    """Print how much the pixels differ, if their picture is there; return the exit code."""
    seed = f"  seed {image.seed}; recorded -> now:"
    try:
        found = difference(record, path, image)
    except ImportError:
        found = None
        console.print("(Pillow measures the difference: pip install 'darkroom-client[pil]')")
    if found is None:
        print_line(console, "different", seed, "bold red")
        return DIFFERENT
    if found.nearly_same:
        print_line(console, f"same to {found}", seed, "bold yellow")
        return NEARLY_SAME
    print_line(console, f"different by {found}", seed, "bold red")
    return DIFFERENT


def _check_output(arguments: argparse.Namespace, record: ReplayRecord) -> None:
    """Raise now for an output that could not be written after the work."""
    path = arguments.output
    if path is None:
        return
    image_format = ImageFormat(record.request.format or ImageFormat.PNG)
    if path.suffix.lower() not in image_format.suffixes:
        raise ValueError(f"{path}: the record's image is in {image_format.value}")
    if path.exists() and not arguments.overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
