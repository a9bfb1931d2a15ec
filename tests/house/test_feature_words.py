"""A newcomer who looks for a feature by its usual name finds one file or folder on each side."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES = {
    "server": ROOT / "server" / "src" / "darkroom_server",
    "client": ROOT / "client" / "src" / "darkroom_client",
}
DOORS_AND_REGISTRIES = ("rpc", "http", "cli", "testing", "settings", "telemetry")
"""Rooms that have a file for each call, setting or metric; the feature itself is elsewhere."""

# What to look for in a path without its ending, and on which sides it must be.
FEATURES = {
    "rate limit or quota": (r"rate_?limit|quota", ["server"]),
    "idempotency": (r"idempoten", ["server"]),
    "retry": (r"retr(y|ies)", ["client"]),
    "subscription": (r"subscri(ption|ber)", ["server"]),
    "estimate": (r"estimat", ["server"]),
    "engine pool": (r"engines?[_/]pool", ["server"]),
    "guidance": (r"guidance", ["server"]),
    "preview": (r"preview", ["server"]),
    "precision or placement": (r"precision|placement", ["server"]),
    "metric labels": (r"metric_?labels", ["server"]),
}


def places(folder: Path, word: str) -> list[str]:
    """The topmost files and folders in ``folder`` whose path has ``word``, doors left out."""
    found: list[str] = []
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts)):
        name = str(path.relative_to(folder).with_suffix(""))
        is_source = path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
        is_inside = any(name.startswith(f"{place}/") for place in found)
        is_door = name.partition("/")[0] in DOORS_AND_REGISTRIES
        if re.search(word, name) and is_source and not is_inside and not is_door:
            found.append(name)
    return sorted(found)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_in_one_place(feature: str) -> None:
    word, required = FEATURES[feature]
    found = {side: places(folder, word) for side, folder in SIDES.items()}
    assert all(len(each) <= 1 for each in found.values()), found
    assert all(found[side] for side in required), found


def test_a_folder_counts_once_and_two_files_twice(tmp_path: Path) -> None:
    for file in ("a/retry/one.py", "a/retry/retry.py", "rpc/retry.py", "b/pool.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert places(tmp_path, "retry") == ["a/retry"]
    (tmp_path / "b/retry_policy.py").touch()
    assert places(tmp_path, "retry") == ["a/retry", "b/retry_policy"]
