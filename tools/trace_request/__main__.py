"""Trace one request and print our files, functions and crossings; ``--check`` holds the limits.

What is counted, for one warm ``Client.generate`` of 64x64 pixels and 4 steps, from the call to its
answer, on an idle server with the fake engine (``auto``: it emits every event inside ``submit``):

* *Ours* are the files under ``server/src/darkroom_server`` and ``client/src/darkroom_client``; the
  generated protos are not.
* A *function* is a code object that started: functions, methods, properties, lambdas and, on
  Python 3.11, comprehensions. A generator or coroutine starts once; each later resumption by the
  event loop or by ``async for`` is not counted.
* A *crossing* is one such start if the frame directly below it on the stack belongs to another of
  our files of the same package. A call that comes from the event loop, from gRPC or from a
  decorator of another package is not counted. Repeated calls count each time, so a step
  adds its crossings once for every step.
* The background is quiet by construction: the fake engine sends no memory reports, nobody scrapes
  the metrics, the client has connected before, and nothing is logged.

By this rule the state before the restructuring (0.1.0) has 46 files, 209 functions and 229
crossings in the server, 10 files, 44 functions and 38 crossings in the client.
"""

import argparse
from pathlib import Path

import darkroom_client
import darkroom_server
from tools.trace_request.event_matches import find_event_matches
from tools.trace_request.request import trace_generate
from tools.trace_request.tracer import Way

MAX_FILES = {"server": 35, "client": 10}
MAX_CROSSINGS = {"server": 130, "client": 38}
MAX_LINES = 400
MAX_EVENT_MATCHES = 1

FOLDERS = {
    "server": Path(darkroom_server.__file__).parent,
    "client": Path(darkroom_client.__file__).parent,
}


def main() -> None:
    """Print the report; exit with 1 if ``--check`` finds a limit exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a limit is exceeded")
    parser.add_argument("--quiet", action="store_true", help="print the totals only")
    options = parser.parse_args()
    ways = trace_generate()
    for name, way in ways.items():
        if not options.quiet:
            print_way(name, way)
    events = find_event_matches(FOLDERS["server"])
    print("engine events are matched in:")
    for place in events:
        print(f"  {place}")
    print()
    for name, way in ways.items():
        print(
            f"{name}: {len(way.files)} files, {len(way.functions)} functions, "
            f"{way.crossings.total()} crossings"
        )
    failures = exceeded(ways, len(events))
    for failure in failures:
        print(f"exceeded: {failure}")
    if options.check and failures:
        raise SystemExit(1)


def print_way(name: str, way: Way) -> None:
    """Print the functions that ran, by file, and the crossings, most frequent first."""
    print(f"== {name}")
    for file in way.files:
        functions = sorted(function for function in way.functions if function.file == file)
        print(f"{file}: {', '.join(function.name for function in functions)}")
    print()
    for (caller, callee), count in way.crossings.most_common():
        print(f"{count:4} {caller} -> {callee}")
    print()


def exceeded(ways: dict[str, Way], event_matches: int) -> list[str]:
    """One line for each limit that is exceeded."""
    failures = []
    for name, way in ways.items():
        if len(way.files) > MAX_FILES[name]:
            failures.append(f"{name}: {len(way.files)} files, at most {MAX_FILES[name]}")
        if way.crossings.total() > MAX_CROSSINGS[name]:
            failures.append(
                f"{name}: {way.crossings.total()} crossings, at most {MAX_CROSSINGS[name]}"
            )
    if event_matches != MAX_EVENT_MATCHES:
        failures.append(
            f"an engine event is matched in {event_matches} places, not in {MAX_EVENT_MATCHES}"
        )
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if (lines := len(path.read_text().splitlines())) > MAX_LINES:
                file = path.relative_to(folder)
                failures.append(f"{name}: {file} has {lines} lines, at most {MAX_LINES}")
    return failures


if __name__ == "__main__":
    main()
