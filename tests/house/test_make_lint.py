"""`make lint`, with programs that only say that they ran."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = "lint-python lint-format lint-imports"
REQUIREMENTS = (
    *("constraints.txt", "requirements-dev.txt", "requirements-bench.txt"),
    *("protos/pyproject.toml", "client/pyproject.toml", "server/pyproject.toml"),
    "protos/requirements-generate.txt",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, in which everything is installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*REQUIREMENTS, ".venv/.installed", ".venv-protos/bin/.installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir()
    program(tmp_path, "ruff")
    program(tmp_path, "lint-imports")
    return tmp_path


def program(checkout: Path, name: str, code: int = 0) -> None:
    file = checkout / ".venv" / "bin" / name
    # Two lines: those of another check must not come between them.
    file.write_text(f'#!/bin/bash\necho "{name} $1 begins"\necho "{name} $1 ends"\nexit {code}\n')
    file.chmod(0o755)


def lint(checkout: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        ["make", "lint", f"CHECKS={CHECKS}"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def outputs(text: str) -> set[str]:
    """The output of each check, without the lines of those that fail."""
    parts = text.split("== ")[1:]
    return {"".join(part.splitlines(keepends=True)[:3]) for part in parts}


ALL = {
    "lint-python\nruff check begins\nruff check ends\n",
    "lint-format\nruff format begins\nruff format ends\n",
    "lint-imports\nlint-imports --no-logo begins\nlint-imports --no-logo ends\n",
}


def test_each_check_shows_its_output_in_one_piece(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outputs(done.stdout) == ALL
    assert "failed" not in done.stdout


def test_every_check_runs_and_those_that_fail_are_named_last(checkout: Path) -> None:
    program(checkout, "ruff", 1)
    done = lint(checkout)
    assert done.returncode != 0
    assert outputs(done.stdout) == ALL
    assert done.stdout.splitlines()[-1] == "lint: failed: lint-format lint-python"
    program(checkout, "ruff")
    program(checkout, "lint-imports", 1)
    done = lint(checkout)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "lint: failed: lint-imports"
