"""The command line ``darkroom-server``. Heavy modules are imported inside functions."""

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from darkroom_server.core.errors import InvalidSettings, StartupError
from darkroom_server.settings.flags import PROGRAM, Parser, add_flags
from darkroom_server.signals import exit_by_signal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from darkroom_server.logs import LogWriter
    from darkroom_server.preflight import Finding
    from darkroom_server.settings.load import Loaded

# gRPC reads this at import. By default it logs every failed handshake in its own format, so any
# port scanner could fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

EXIT_FAILED = 1
EXIT_MISUSED = 2
"""Wrong settings, a port in use, a model that cannot be loaded. A restart does not help."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Exits with 0, 1 (unhealthy, or no engine remains) or 2 (wrong settings or arguments).
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    try:
        match command:
            case "serve":
                _serve(given)
            case "compile":
                _compile(given)
            case "healthcheck":
                _healthcheck(**given)
            case "token":
                _token(**given)
            case "migrate-ledger":
                _migrate_ledger(**given)
            case _:
                parser.print_help()
    except InvalidSettings as error:
        _exit(EXIT_MISUSED, *error.problems)
    except StartupError as error:
        _exit(EXIT_MISUSED, str(error))


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="A gRPC server for text-to-image diffusion models.")
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the version and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        usage=f"{PROGRAM} serve [OPTION ...]",
        help="load models and serve them",
        description="Load models and serve them until SIGTERM or SIGINT. Each setting is a flag, "
        "an environment variable (DARKROOM_SERVE_…) and a key of the file. The token for the hub "
        "comes from HF_TOKEN.",
    )
    _add_config(serve)
    instead = serve.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="do not serve: check the settings, the ports and the state folder, load the models, "
        "and exit with 0 if all is well, with 1 if not, with 2 if a setting is invalid",
    )
    instead.add_argument(
        "--print-config",
        action="store_true",
        help="do not serve: print the settings in effect as TOML, without secrets, and exit",
    )
    add_flags(serve)
    compile = commands.add_parser(
        "compile",
        usage=f"{PROGRAM} compile [OPTION ...] [MODEL ...]",
        help="compile denoisers ahead of time",
        description="Load models as `serve` does and compile their denoisers for this machine, "
        "unless the results are on disk. `serve` with equal options uses them at once. Exit with 0 "
        "if every denoiser is compiled, with 1 if not, with 2 if a setting is invalid.",
    )
    _add_config(compile)
    compile.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="as --model of `serve`; default: the models of the settings",
    )
    add_flags(compile)
    health = commands.add_parser(
        "healthcheck",
        help="check whether a server is ready",
        description="Exit with 0 if the server is ready, with 1 if it is not. Without --target, "
        "the address comes from the environment and the file, as for `serve`.",
    )
    _add_config(health)
    health.add_argument("--target", metavar="HOST:PORT", help="the server's address")
    health.add_argument(
        "--ca", metavar="FILE", help="with --target: use TLS and trust these certificates (PEM)"
    )
    health.add_argument("--cert", metavar="FILE", help="with --ca: the client certificate (PEM)")
    health.add_argument("--key", metavar="FILE", help="with --cert: its private key (PEM)")
    health.add_argument(
        "--server-name", metavar="NAME", help="with --ca: the name in the server's certificate"
    )
    health.add_argument(
        "--service",
        metavar="NAME",
        default="",
        help="health name to check: empty for readiness, `liveness` for the process",
    )
    health.add_argument("--timeout", metavar="SECONDS", type=float, default=3.0, help="default: 3")
    token = commands.add_parser(
        "token",
        help="create a token for a caller",
        description="Print a new token, and its lines for the file of `serve --tokens`. The file "
        "holds only a hash; the token itself is stored nowhere.",
    )
    token.add_argument("name", metavar="NAME", help="the caller's name")
    migrate = commands.add_parser(
        "migrate-ledger",
        help="create or migrate the ledger in PostgreSQL",
        description="Create the tables of the ledger in PostgreSQL, or migrate them to this "
        "version. `serve` does that too, if its role may. Without --ledger, the URL comes from the "
        "environment and the file, as for `serve`.",
    )
    _add_config(migrate)
    migrate.add_argument("--ledger", metavar="URL", help="as --ledger of `serve`")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a TOML file with settings")


class _Version(argparse.Action):
    """Prints the version; looks it up only on use."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('darkroom-server')}")
        parser.exit()


def _serve(flags: dict[str, Any]) -> None:
    # Until the server installs its own signal handlers.
    signal.signal(signal.SIGTERM, lambda number, _: exit_by_signal(number))
    check, print_config = flags.pop("check"), flags.pop("print_config")
    loaded = _load(flags.pop("config"), flags)
    if print_config:
        from darkroom_server.settings.effective import effective_toml

        print(effective_toml(loaded, os.environ), end="")
        return
    from darkroom_server.app import EngineLost, run

    writer = _open_log(loaded)
    if check:
        from darkroom_server.preflight import preflight

        _report(preflight(loaded.settings))
    try:
        run(loaded.settings, log_writer=writer)
    except EngineLost as error:
        code, message = EXIT_FAILED, str(error)
    except StartupError as error:
        code, message = EXIT_MISUSED, str(error)
    else:
        return
    # Not printed: a reader of the log that has stalled would prevent the exit.
    writer.put(_error_line(message))
    raise SystemExit(code)


def _compile(flags: dict[str, Any]) -> NoReturn:
    from darkroom_server.preflight import compile_denoisers

    if models := flags.pop("models"):
        flags["model"] = models
    loaded = _load(flags.pop("config"), {**flags, "compile": "blocking"})
    _open_log(loaded)
    _report(compile_denoisers(loaded.settings))


def _open_log(loaded: "Loaded") -> "LogWriter":
    """Start to log, with the warnings about the settings first; create the folders to write in."""
    import structlog

    from darkroom_server.logs import capture_native_lines, configure_logs
    from darkroom_server.settings.state_folder import create_scratch_folders

    writer = configure_logs(loaded.settings.logs, capture_native_lines())
    log = structlog.get_logger(__name__)
    for warning in loaded.warnings:
        log.warning(warning)
    try:
        os.environ.update(create_scratch_folders(loaded.settings.storage, os.environ))
    except OSError as error:
        log.warning("state folder cannot be written", why=str(error))
    return writer


def _report(findings: "AsyncIterator[Finding]") -> NoReturn:
    """Print each finding as it comes, and exit."""
    import asyncio

    # A load cannot be interrupted otherwise; the engine process ends with this one.
    signal.signal(signal.SIGINT, lambda number, _: exit_by_signal(number))

    async def report() -> bool:
        usable = True
        async for finding in findings:
            print(f"{'ok' if finding.ok else 'problem':8} {finding.text}", flush=True)
            usable = usable and finding.ok
        return usable

    raise SystemExit(0 if asyncio.run(report()) else EXIT_FAILED)


def _healthcheck(
    config: str | None, target: str | None, service: str, timeout: float, **tls: str | None
) -> None:
    from darkroom_server.healthcheck import given_target, healthcheck, target_of

    asked = given_target(target, **tls) if target else target_of(_load(config, {}).settings)
    healthy, line = healthcheck(asked, service, timeout)
    print(line)
    raise SystemExit(0 if healthy else EXIT_FAILED)


def _token(name: str) -> None:
    from darkroom_server.security.new_token import create_token

    print(create_token(name))


def _migrate_ledger(config: str | None, ledger: str | None) -> None:
    import asyncio

    from darkroom_server.ledger.choice import migrate

    loaded = _load(config, {"ledger": ledger} if ledger else {})
    print(asyncio.run(migrate(loaded.settings.storage.ledger)))


def _load(config: str | None, flags: dict[str, Any]) -> "Loaded":
    from darkroom_server.settings.load import load_settings

    return load_settings(flags, os.environ, config)


def _exit(code: int, *messages: str) -> NoReturn:
    for message in messages:
        print(_error_line(message), file=sys.stderr)
    raise SystemExit(code)


def _error_line(message: str) -> str:
    return f"{PROGRAM}: error: {' '.join(message.split())}"
