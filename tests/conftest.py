"""For all tests: how they are run must not decide what they find."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tools.postgres import Cluster, cluster

# On a busy machine hypothesis must not fail a test for its time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Servers that the tests start measure by themselves, and write nothing into the user's cache.
os.environ["DARKROOM_SERVE_MEASUREMENT_CACHE"] = "false"

# On a busy machine the threads of one operation wait for each other longer than they compute.
os.environ["OMP_NUM_THREADS"] = "1"

# By default structlog shows the variables of each frame: seconds for each exception in the engine.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

# A shell starts what runs in the background with interrupts ignored, and so would the programs that
# the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROGRAMS = {
    "promtool": ["promtool"],
    "prometheus": ["prometheus"],
    "node": ["node", "npm"],
    "chromium": ["chromium|google-chrome", "chromedriver"],
    "zsh": ["zsh"],
    "fish": ["fish"],
    "faketime": ["faketime"],
    "postgresql": ["initdb", "postgres", "pg_isready"],
    "kubectl": ["kubectl"],
    "systemd-analyze": ["systemd-analyze"],
}
"""What a test may need by ``@pytest.mark.needs``: `make test-tools` installs it,
except the last two, of which Debian's kubectl is too old. "|" is "or"."""


LONG, SHORT = ("compat", "faults", "observe", "packaging", "page", "wire"), ("client", "server")
"""Folders with tests of many seconds, and with mostly short ones."""


def place(nodeid: str) -> int:
    """Where a test is run if several processes share the tests: 0 is first, 2 is last."""
    folder = nodeid.split("/")[1] if nodeid.startswith("tests/") else ""
    return 0 if folder in LONG else 2 if folder in SHORT else 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let no process begin with a long test when the others have nothing left to run."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.nodeid))


def is_installed(program: str) -> bool:
    if any(map(shutil.which, program.split("|"))):
        return True
    # Debian keeps the programs of PostgreSQL's server to itself.
    return any(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """A PostgreSQL for all tests of this process; a test that kills one starts its own."""
    with cluster() as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test if a program that it says it needs is not installed."""
    for marker in item.iter_markers("needs"):
        for tool in marker.args:
            if not all(map(is_installed, PROGRAMS[tool])):
                pytest.skip(f"needs {tool}")


def pytest_configure(config: pytest.Config) -> None:
    # A worker reports its skips to the process that distributes the tests.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(in_ci=os.environ.get("CI") == "true"))


class Skips:
    """Says in one last line what was skipped for want of a program; fails the run in CI.

    CI allows no skipped test at all.
    """

    def __init__(self, *, in_ci: bool) -> None:
        self._in_ci = in_ci
        self._reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._count(report)

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, tuple)
            self._reasons.append(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._in_ci and self._reasons and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self) -> None:
        for_tools = [reason for reason in self._reasons if reason.startswith("needs ")]
        if self._in_ci and self._reasons:
            reasons = "; ".join(sorted(set(self._reasons)))
            print(f"failed: CI allows no skipped test: {len(self._reasons)} skipped: {reasons}")
        elif for_tools:
            tools = ", ".join(sorted({reason.removeprefix("needs ") for reason in for_tools}))
            print(
                f"skipped: {len(for_tools)} tests that need {tools}: "
                "`make test-tools`, as root, installs what is missing"
            )
