"""The arguments of the command line."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from darkroom_client._settings import DEFAULT_TARGET, DEFAULT_TIMEOUT
from darkroom_client._types.enums import ImageFormat, PromptSyntax, Scheduler
from darkroom_client.cli._completion import SHELLS
from darkroom_client.cli._exit_codes import TABLE
from darkroom_client.cli._flags import flags_of, meant
from darkroom_client.cli._inputs import add_inputs
from darkroom_client.cli.commands import (
    _adapters,
    _cancel,
    _completion,
    _estimate,
    _generate,
    _jobs,
    _models,
    _replay,
    _status,
    _submit,
    _top,
    _wait,
    _watch,
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
        name: str,
        text: str,
        run: Callable[[argparse.Namespace], int],
        timeout: float | None,
        limit: str = "",
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, parser=added, needs_rich=True)
        _add_connection(added, timeout, limit)
        return added

    long = f"no limit on a terminal, else {_generate.UNATTENDED_SECONDS:g} for each prompt"
    _add_generate(command("generate", "generate images from prompts", _generate.run, None, long))
    estimate = command("estimate", "estimate what a request would take now", _estimate.run, 10.0)
    estimate.add_argument("prompt", nargs="?", default="a picture", metavar="PROMPT")
    estimate.add_argument("--json", action="store_true", help="print one JSON object")
    _add_request(estimate)
    _add_submit(command("submit", "start jobs, and print their ids", _submit.run, 10.0))
    _add_watch(command("watch", "follow a job, and save its images", _watch.run, None, long))
    cancel = command("cancel", "cancel jobs", _cancel.run, 10.0)
    cancel.add_argument("request_ids", nargs="+", metavar="ID", help="what `submit` printed")
    _add_jobs(command("jobs", "list your jobs on the server", _jobs.run, 10.0))
    _add_models(
        command(
            "models",
            "list, load, unload or pin the models of the server",
            _models.run,
            None,
            f"{_models.SHORT_SECONDS:g}, and no limit for a load",
        )
    )
    _add_adapters(
        command("adapters", "list, add or remove the adapters of the server", _adapters.run, 10.0)
    )
    _add_replay(command("replay", "reproduce a recorded image", _replay.run, DEFAULT_TIMEOUT))
    status = command("status", "show the status of the server", _status.run, 10.0)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    _add_top(command("top", "show what the server does, live", _top.run, 10.0))
    command("wait", "wait until the server is ready", _wait.run, DEFAULT_TIMEOUT)
    completion = commands.add_parser("completion", help="print a script that completes in a shell")
    completion.set_defaults(run=_completion.run, parser=completion, needs_rich=False)
    completion.set_defaults(commands=commands.choices)
    completion.add_argument(
        "shell", choices=SHELLS, help='such as: eval "$(darkroom completion bash)"'
    )
    return _parse_known(parser, commands.choices, argv)


def _parse_known(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    """Parse; for an unknown command or flag, say which one may be meant."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-") and given[0] not in commands:
        known = f"there are {', '.join(commands)}"
        parser.error(f"no command {given[0]!r}{meant(given[0], commands) or f': {known}'}")
    arguments, unknown = parser.parse_known_args(given)
    if hasattr(arguments, "names") and not any(each.startswith("-") for each in unknown):
        # After `models pin --unpin`, argparse takes no further names.
        arguments.names += unknown
        unknown = []
    if unknown:
        command: argparse.ArgumentParser = arguments.parser
        flags = [each.partition("=")[0] for each in unknown if each.startswith("-")]
        hint = meant(flags[0], flags_of(command)) if flags else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def _add_connection(parser: argparse.ArgumentParser, timeout: float | None, limit: str) -> None:
    """``limit``: the default of --timeout in words, if it is not always ``timeout``."""
    add = parser.add_argument_group("connection").add_argument
    add(
        "--target",
        metavar="HOST:PORT",
        help="the server's address; several with commas between: jobs go to the less busy ones",
    )
    add("--tls", action="store_true", help="encrypt, and trust the CAs of this machine")
    add("--ca", metavar="FILE", type=Path, help="PEM file of the trusted CAs; turns TLS on")
    add("--cert", metavar="FILE", type=Path, help="PEM file of the client certificate; with --key")
    add("--key", metavar="FILE", type=Path, help="PEM file of the private key of --cert")
    add("--server-name", metavar="NAME", help="the name in the server's certificate; turns TLS on")
    add("--insecure", action="store_true", help="no TLS, and send a token unencrypted")
    add(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=timeout,
        help=f"how long to wait for an answer (default: {limit or f'{timeout:g}'})",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="what to generate; - reads stdin, one prompt per line",
    )
    add("--file", metavar="FILE", type=Path, help="read prompts from FILE, one per line")
    add(
        "--request-id",
        metavar="ID",
        default="",
        help="the id of the job, for one prompt; the same command again joins that job",
    )
    add(
        "--no-embed-record",
        dest="embed_record",
        action="store_false",
        help="keep the record, the prompt included, out of the image files",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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
    add("--json", action="store_true", help="print one JSON object per line")
    add("-v", "--verbose", action="store_true", help="print the seconds of each stage")
    add(
        "--no-picture",
        dest="picture",
        action="store_false",
        help="do not leave the last image on the terminal",
    )


def _add_submit(parser: argparse.ArgumentParser) -> None:
    _add_prompts(parser)
    add = parser.add_argument
    add("--time-limit", metavar="SECONDS", type=float, help="the job's deadline, from now on")
    add("--json", action="store_true", help="print one JSON object per line")
    _add_request(parser)


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="ID", help="what `submit` printed")
    _add_files(parser)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=1.0,
        help="the time between two looks (default: %(default)g)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_prompts(parser)
    _add_files(parser)
    add = parser.add_argument
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
    add(
        "--scheduler",
        type=_scheduler,
        choices=list(Scheduler),
        metavar="NAME",
        help=f"one of {', '.join(Scheduler)}",
    )
    add(
        "--format",
        type=_format,
        choices=list(ImageFormat),
        metavar="FORMAT",
        default=ImageFormat.PNG,
        help=f"one of {', '.join(ImageFormat)} (default: %(default)s)",
    )
    add("--quality", metavar="1-100", type=int, help="for jpeg and webp")
    add("--exact", action="store_true", help="the same bytes at any load of the server; slower")
    _add_optional_fields(parser)


def _add_optional_fields(parser: argparse.ArgumentParser) -> None:
    title = "request, for models that take it (see `darkroom models`)"
    add = parser.add_argument_group(title).add_argument
    add(
        "--true-cfg-scale",
        metavar="SCALE",
        type=float,
        help="guidance of a model with embedded guidance; above 1 it needs a negative prompt",
    )
    add("--guidance-rescale", metavar="0-1", type=float, help="against overexposed images")
    add("--max-sequence-length", metavar="N", type=int, help="tokens of the prompt")
    for number, encoder in ((2, "second"), (3, "third")):
        add(
            f"--prompt-{number}",
            metavar="TEXT",
            default="",
            help=f"the prompt for the {encoder} text encoder",
        )
        add(
            f"--negative-{number}",
            metavar="TEXT",
            default="",
            help=f"the negative prompt for the {encoder} text encoder",
        )
    add("--empty-negative", action="store_true", help="an empty negative prompt, and not none")
    add(
        "--prompt-syntax",
        choices=list(PromptSyntax),
        metavar="NAME",
        help='plain, or weighted to read weights such as "a (red:1.3) circle"',
    )
    add_inputs(parser)


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
    admins = "load, unload and pin are for the server's admins"
    _add_action(parser, _models.ACTIONS, admins, "the models to load, unload or pin")
    parser.add_argument(
        "--unpin", action="store_true", help="with pin: the models may make room for others again"
    )


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    admins = "add and remove are for the server's admins"
    _add_action(parser, _adapters.ACTIONS, admins, "the adapters to add or remove")
    parser.add_argument("--model", metavar="ID", default="", help="only those that fit this model")


def _add_action(
    parser: argparse.ArgumentParser, actions: Sequence[str], admins: str, names: str
) -> None:
    """The arguments of a command that lists things of the server, or changes those of NAME."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=actions,
        default="list",
        help=f"what to do (default: list); {admins}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_replay(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "record",
        metavar="FILE",
        type=Path,
        help="an image that `generate` saved, or the NAME.json of its --record",
    )
    add(
        "--input",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="an image that the recorded one started from; may be given several times",
    )
    add("-o", "--output", metavar="FILE", type=Path, help="write the new image to FILE")
    add("--overwrite", action="store_true", help="replace FILE if it exists")


def _scheduler(text: str) -> Scheduler:
    try:
        return Scheduler(text)
    except ValueError:
        raise argparse.ArgumentTypeError(_unknown(text, Scheduler)) from None


def _format(text: str) -> ImageFormat:
    try:
        return ImageFormat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(_unknown(text, ImageFormat)) from None


def _unknown(text: str, names: Iterable[str]) -> str:
    known = list(names)
    return f"{text!r} is not one of {', '.join(known)}{meant(text, known)}"


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x768") from None
