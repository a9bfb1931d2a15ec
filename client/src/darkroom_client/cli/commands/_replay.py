"""``darkroom replay``: reproduce a recorded image, and check that it is the same."""

import argparse

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.replay import ReplayRecord
from darkroom_client.cli._connect import connect
from darkroom_client.cli._exit_codes import DIFFERENT
from darkroom_client.cli.terminal._console import open_console, print_line


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if the pixels are identical; print what differs and return 1 if not."""
    record = ReplayRecord.from_json(arguments.record.read_text(encoding="utf-8"))
    _check_output(arguments, record)
    with connect(arguments) as client:
        image = client.replay(record).images[0]
    if arguments.output is not None:
        image.save(arguments.output, overwrite=arguments.overwrite)
    console = open_console()
    if image.replay.pixels_sha256 and image.replay.pixels_sha256 == record.pixels_sha256:
        rest = f"  seed {image.seed}  sha256 {record.pixels_sha256}"
        print_line(console, "identical", rest, "bold green")
        return 0
    print_line(console, "different", f"  seed {image.seed}; recorded -> now:", "bold red")
    for name, (then, now) in record.differences(image.replay).items():
        console.print(f"  {name}: {then} -> {now}")
    if not record.request.exact:
        console.print(
            "  (generated without --exact: the last bits may depend on the server's load)"
        )
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
