"""`.ci/run`: its steps, with a make that only notes them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ["setup", "lint", "demo", "wheels", "test"]
MAKE = """#!/bin/bash
case "$1" in
    test-tools)
        read -r _ <begun
        echo "a line of apt"
        touch installed
        exit "${TOOLS:-0}"
        ;;
    lint) echo >begun ;;
    wheels) mkdir dist ;;
    test) [[ -e installed && -d "$BUILT_WHEELS" ]] || exit 1 ;;
esac
echo "$1" >>steps
[[ "$1" != "${BROKEN:-}" ]]
"""
"""It installs the tools only once `make lint` runs."""


def run_ci(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / "bin").mkdir()
    make = folder / "bin" / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    os.mkfifo(folder / "begun")
    return subprocess.run(
        [folder / ".ci" / "run"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment},
    )


def steps(folder: Path) -> list[str]:
    return (folder / "steps").read_text().splitlines()


def test_tools_are_installed_beside_the_checks_and_before_the_tests(tmp_path: Path) -> None:
    done = run_ci(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path) == STEPS
    before, after = done.stdout.split("a line of apt")
    assert "make wheels" in before
    assert "make test (" in after


def test_tools_that_cannot_be_installed_fail_it_with_their_output(tmp_path: Path) -> None:
    done = run_ci(tmp_path, TOOLS="100")
    assert done.returncode != 0
    assert done.stdout.endswith("a line of apt\n")
    assert steps(tmp_path) == STEPS[:-1]


@pytest.mark.parametrize("broken", STEPS[1:])
def test_a_step_that_fails_ends_it_once_the_tools_are_installed(
    tmp_path: Path, broken: str
) -> None:
    done = run_ci(tmp_path, BROKEN=broken)
    assert done.returncode != 0
    assert steps(tmp_path) == STEPS[: STEPS.index(broken) + 1]
    assert (tmp_path / "installed").exists()
