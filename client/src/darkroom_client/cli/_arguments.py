"""The arguments of the command line."""

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path

from darkroom_client._settings import DEFAULT_TARGET, DEFAULT_TIMEOUT
from darkroom_client._types.enums import ImageFormat, Scheduler
from darkroom_client.cli._exit_codes import TABLE
from darkroom_client.cli.commands import (
    _estimate,
    _generate,
    _jobs,
    _models,
    _replay,
    _status,
    _wait,
)

_EPILOG = f"""\
environment:
  DARKROOM_TARGET  the server's host:port; {DEFAULT_TARGET} if unset
  DARKROOM_TOKEN   the token to send; needs TLS or --insecure
  DARKROOM_CA      PEM file of the trusted CA certificates; turns TLS on

{TABLE}"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; ``run`` is the command. Exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="darkroom",
        description="Generate images on a Darkroom server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("darkroom-client")
    parser.add_argument("--version", action="version", version=f"darkroom {version}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, text: str, run: Callable[[argparse.Namespace], int], timeout: float | None
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        _add_connection(added, timeout)
        return added

    _add_generate(command("generate", "generate images from prompts", _generate.run, None))
    estimate = command("estimate", "estimate what a request would take now", _estimate.run, 10.0)
    estimate.add_argument("prompt", nargs="?", default="a picture", metavar="PROMPT")
    estimate.add_argument("--json", action="store_true", help="print one JSON object")
    _add_request(estimate)
    _add_jobs(command("jobs", "list your jobs on the server", _jobs.run, 10.0))
    _add_models(command("models", "list the models of the server", _models.run, 10.0))
    _add_replay(command("replay", "reproduce a recorded image", _replay.run, DEFAULT_TIMEOUT))
    status = command("status", "show the status of the server", _status.run, 10.0)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    command("wait", "wait until the server is ready", _wait.run, DEFAULT_TIMEOUT)
    return parser.parse_args(argv)


def _add_connection(parser: argparse.ArgumentParser, timeout: float | None) -> None:
    add = parser.add_argument_group("connection").add_argument
    add("--target", metavar="HOST:PORT", help="the server's address")
    add("--ca", metavar="FILE", type=Path, help="PEM file of the trusted CAs; turns TLS on")
    add("--cert", metavar="FILE", type=Path, help="PEM file of the client certificate; with --key")
    add("--key", metavar="FILE", type=Path, help="PEM file of the private key of --cert")
    add("--insecure", action="store_true", help="no TLS, and send a token unencrypted")
    add(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=timeout,
        help=(
            "how long to wait for an answer (default: "
            + (
                f"no limit on a terminal, else {_generate.UNATTENDED_SECONDS:g} for each prompt)"
                if timeout is None
                else f"{timeout:g})"
            )
        ),
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="what to generate; - reads stdin, one prompt per line",
    )
    add("--file", metavar="FILE", type=Path, help="read prompts from FILE, one per line")
    add(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="the folder for the images (default: this one)",
    )
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--record", action="store_true", help="write NAME.json, for `replay`, beside each image")
    add(
        "--no-embed-record",
        dest="embed_record",
        action="store_false",
        help="keep the record, the prompt included, out of the image files",
    )
    add("--json", action="store_true", help="print one JSON object per line")
    add(
        "--concurrency",
        metavar="N",
        type=int,
        default=8,
        help="number of prompts at a time (default: %(default)s)",
    )
    add("--preview", action="store_true", help="show unfinished images; needs Pillow")
    _add_request(parser)


def _add_request(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("request").add_argument
    add("--model", metavar="ID", default="", help="one of `darkroom models`")
    add("--negative", metavar="TEXT", default="", help="what the images should not show")
    add("--steps", metavar="N", type=int, help="denoising steps")
    add("--guidance", metavar="SCALE", type=float, help="classifier-free guidance")
    add("--seed", metavar="N", type=int, help="image i uses the seed N + i")
    add("--size", metavar="WxH", type=_size, default=(None, None), help="pixels, such as 512x768")
    add("--count", metavar="N", type=int, default=1, help="images of each prompt")
    add("--scheduler", choices=[scheduler.value for scheduler in Scheduler])
    add(
        "--format",
        type=ImageFormat,
        metavar="FORMAT",
        default=ImageFormat.PNG,
        help=f"one of {', '.join(ImageFormat)} (default: %(default)s)",
    )
    add("--quality", metavar="1-100", type=int, help="for jpeg and webp")
    add("--exact", action="store_true", help="the same bytes at any load of the server; slower")


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("request_ids", nargs="*", metavar="ID", help="only these jobs")
    add("--json", action="store_true", help="print one JSON object per line")
    add(
        "--limit",
        metavar="N",
        type=int,
        default=100,
        help="the last N jobs (default: %(default)s)",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_replay(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "record",
        metavar="FILE",
        type=Path,
        help="an image that `generate` saved, or the NAME.json of its --record",
    )
    add("-o", "--output", metavar="FILE", type=Path, help="write the new image to FILE")
    add("--overwrite", action="store_true", help="replace FILE if it exists")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x768") from None
