"""`make test` on a machine without promtool, Prometheus or Node."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "promtool",
    "prometheus",
    "node",
    "npm",
    "chromedriver",
    "chromium",
    "initdb",
    "zsh",
    "fish",
    "faketime",
)
SKIPPING = """
import pytest

@pytest.mark.needs("promtool")
def test_rules(): pass

@pytest.mark.needs("promtool", "node")
def test_both(): pass

def test_other(): pass
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """A machine with a shell and little else, where we are root; apt-get only notes its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("bash", "env", "grep"):
        path = shutil.which(program)
        assert path is not None
        (folder / program).symlink_to(path)
    apt = folder / "apt-get"
    apt.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/apt\n')
    apt.chmod(0o755)
    become(0, {"PATH": str(folder)})
    return {"PATH": str(folder), "POSTGRESQL_FOLDER": str(tmp_path)}


def become(user: int, environment: dict[str, str]) -> None:
    identity = Path(environment["PATH"]) / "id"
    identity.write_text(f"#!/bin/bash\necho {user}\n")
    identity.chmod(0o755)


def run_script(mode: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["/bin/bash", ROOT / "tools" / "test_tools.sh", mode],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def installed(folder: Path) -> list[str]:
    """The packages that apt-get was asked for."""
    calls = folder / "apt"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.split()[-1] for line in lines if line.startswith("install")]


@pytest.mark.parametrize(("mode", "ci"), [("yes", ""), ("auto", "true")])
def test_what_is_missing_is_installed(
    bare: dict[str, str], tmp_path: Path, mode: str, ci: str
) -> None:
    done = run_script(mode, {**bare, "CI": ci})
    assert done.returncode == 0, done.stderr
    assert installed(tmp_path) == [
        "prometheus",
        "nodejs",
        "npm",
        "chromium-driver",
        "zsh",
        "fish",
        "faketime",
        "chromium",
        "postgresql",
    ]


def test_only_what_is_missing_is_installed(bare: dict[str, str], tmp_path: Path) -> None:
    for program in set(PROGRAMS) - {"promtool", "prometheus", "chromium"} | {"google-chrome"}:
        (Path(bare["PATH"]) / program).symlink_to("/bin/true")
    assert run_script("yes", bare).returncode == 0
    assert installed(tmp_path) == ["prometheus"]


@pytest.mark.parametrize(("mode", "present"), [("no", ()), ("yes", PROGRAMS), ("auto", PROGRAMS)])
def test_nothing_is_installed(
    bare: dict[str, str], tmp_path: Path, mode: str, present: tuple[str, ...]
) -> None:
    for program in present:
        (Path(bare["PATH"]) / program).symlink_to("/bin/true")
    assert run_script(mode, {**bare, "CI": "true"}).returncode == 0
    assert installed(tmp_path) == []


@pytest.mark.parametrize(("container", "code"), [("docker", 0), ("", 1)])
def test_a_failure_of_apt_is_an_error_in_ci_only(
    bare: dict[str, str], container: str, code: int
) -> None:
    apt = Path(bare["PATH"]) / "apt-get"
    apt.write_text("#!/bin/bash\nexit 100\n")
    ci = "" if container else "true"
    done = run_script("auto", {**bare, "CI": ci, "container": container})
    assert done.returncode == code
    assert ("could not install them" in done.stderr) == bool(container)


@pytest.mark.parametrize(("mode", "ci"), [("yes", ""), ("auto", "true")])
def test_without_root_nothing_is_installed_and_the_command_is_named(
    bare: dict[str, str], tmp_path: Path, mode: str, ci: str
) -> None:
    become(1000, bare)
    done = run_script(mode, {**bare, "CI": ci})
    assert done.returncode == 1
    assert "run `make test-tools` as root" in done.stderr
    assert installed(tmp_path) == []


def run_pytest(
    folder: Path, environment: dict[str, str], *flags: str
) -> "subprocess.CompletedProcess[str]":
    (folder / "test_sample.py").write_text(SKIPPING)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "tests.conftest"),
            *("-p", "no:cacheprovider", "-W", "ignore", *flags, str(folder)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_test_without_its_program_is_skipped_and_named_last(
    bare: dict[str, str], tmp_path: Path
) -> None:
    done = run_pytest(tmp_path, bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 skipped" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("skipped: 2 tests that need promtool: `make test-tools`")


@pytest.mark.parametrize("flag", ["-n0", "-n2"])
def test_ci_fails_on_a_skip(bare: dict[str, str], tmp_path: Path, flag: str) -> None:
    done = run_pytest(tmp_path, {**bare, "CI": "true"}, flag)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert done.stdout.splitlines()[-1].startswith("failed: CI allows no skipped test: 2 skipped")


def test_with_the_programs_nothing_is_skipped(bare: dict[str, str], tmp_path: Path) -> None:
    for program in PROGRAMS:
        (Path(bare["PATH"]) / program).symlink_to("/bin/true")
    done = run_pytest(tmp_path, {**bare, "CI": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
