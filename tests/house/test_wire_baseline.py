"""A change of the protos that breaks callers of 0.1.0 is found, however many commits ago it was."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"


def breaking(protos: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(Path(sys.executable).with_name("buf"), "breaking", protos),
            *("--against", PROTOS / "baseline.binpb"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def changed(folder: Path, file: str, pattern: str, replacement: str) -> Path:
    """A copy of the protos with one change in ``file``."""
    shutil.copytree(PROTOS / "darkroom", folder / "darkroom")
    shutil.copy(PROTOS / "buf.yaml", folder)
    path = folder / "darkroom" / "v1" / file
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "says"),
    [
        ("generation.proto", r"\n *string prompt = 2;", "", 'with name "prompt"'),
        ("generation.proto", r"(?<=string prompt = )2;", "999;", 'with name "prompt"'),
        ("generation.proto", r"string(?= prompt = 2;)", "bytes", "changed type"),
        ("generation.proto", r"rpc Generate\(", "rpc Make(", 'RPC "Generate"'),
        ("server.proto", r"(rpc GetStatus.* returns \()", r"\1stream ", "streaming"),
        ("types.proto", r"\n *SCHEDULER_DDIM = \d+;", "", '"Scheduler" was deleted'),
    ],
)
def test_a_break_is_found(
    tmp_path: Path, file: str, pattern: str, replacement: str, says: str
) -> None:
    done = breaking(changed(tmp_path, file, pattern, replacement))
    assert done.returncode == 100, done.stderr
    assert says in done.stdout


def test_an_addition_does_not_break(tmp_path: Path) -> None:
    added = r"\1\n  // An addition.\n  string addition = 1000;"
    protos = changed(tmp_path, "generation.proto", r"(message GenerateRequest \{)", added)
    done = breaking(protos)
    assert (done.returncode, done.stdout) == (0, "")
