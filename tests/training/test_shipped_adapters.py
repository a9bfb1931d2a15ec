import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from training.adapters.card import write_card
from training.adapters.evaluate import GOAL, MOST_CONTROLS, PROMPTS
from training.adapters.lora import SIZE_LIMIT
from training.adapters.styles import STYLES
from training.adapters.trials import KINDS

FOLDER = Path(__file__).parents[2] / "server" / "src" / "darkroom_server" / "demo_adapters"


@pytest.fixture(scope="module")
def evaluation() -> Any:
    return json.loads((FOLDER / "evaluation.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_goals_are_met(evaluation: Any, kind: str) -> None:
    assert evaluation["prompts"] == PROMPTS
    assert evaluation["kinds"][kind]["right"] >= GOAL
    assert evaluation["kinds"][kind]["controls"] <= MOST_CONTROLS


def test_loras_are_small_and_in_half_precision() -> None:
    files = sorted((FOLDER / "loras").iterdir())
    assert [file.stem for file in files] == sorted(STYLES)
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            assert {opened.get_slice(key).get_dtype() for key in keys} == {"F16"}
        assert all(key.startswith("unet.") and ".lora_" in key for key in keys)


def test_the_card_has_the_recorded_numbers(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").unlink()
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (FOLDER / "README.md").read_text("utf-8")
