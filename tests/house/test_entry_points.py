"""CI, the hooks and the pages call make targets that exist."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / ".ci" / "run"])


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_that_a_page_names_exists(page: Path) -> None:
    # In code only: prose may say "make sure".
    named = re.findall(r"(?:^|`)(?:sudo )?make ([a-z][a-z-]*)", page.read_text(), re.M)
    assert set(named) <= TARGETS


def test_the_hooks_call_make_targets() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert entries
    for command, option, *targets in entries:
        assert (command, option) == ("make", "--no-print-directory")
        assert targets
        assert set(targets) <= TARGETS


def test_the_workflow_calls_the_one_entry_of_ci() -> None:
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert len(commands) == 1
    assert commands[0].split()[-1] == ".ci/run"


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_a_machine_without_an_index_installs_nothing(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), target]
    printed = subprocess.check_output([*command, "SETUP=", "BIN=there"], text=True)
    assert "there/python -m" in printed
    assert "pip" not in printed
    usual = subprocess.check_output(command, text=True)
    assert "-m pip install" in usual, "the negative control"
