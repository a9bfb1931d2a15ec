"""The seam of the model families: what a new one must provide, and nothing else."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import dummy_torch_and_transformers_and_sentencepiece_objects as without

from bench.tiny_families import CASES
from bench.tiny_families.kolors import save_sentencepiece, write_kolors
from bench.tiny_families.pixart import write_sigma
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.families import registry
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import LoopUnderTest, config_for, make_job
from .families.edit import CASES as EDITING
from .folders import edit_index, edited
from .model_table import cells, check_row, read_table

STABLE_DIFFUSION = "Stable Diffusion 1.x, 2.x"
"""The row of the family whose samples are not suspended pipelines."""


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_a_family_is_registered_under_a_class_of_diffusers(name: str) -> None:
    family = registry.FAMILIES[name]
    assert name == family.pipeline_class
    assert hasattr(diffusers, name)
    assert family.denoiser_name in family.components


def test_one_more_line_in_the_registry_serves_one_more_class(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panorama(StableDiffusion):
        pipeline_class = "StableDiffusionPanoramaPipeline"

    folder = edited(
        tiny_folder,
        tmp_path / "panorama",
        lambda f: edit_index(f, _class_name="StableDiffusionPanoramaPipeline"),
    )
    source = ModelSource(id="tiny", location=str(folder))
    monkeypatch.setitem(registry.FAMILIES, Panorama.pipeline_class, Panorama)
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.float32)
    assert type(pipeline) is diffusers.StableDiffusionPanoramaPipeline
    loop = LoopUnderTest(config_for(folder))
    try:
        assert loop.models["tiny"].info.kind == "StableDiffusionPanoramaPipeline"
        assert isinstance(loop.run(make_job("wide"))["wide"], JobFinished)
    finally:
        loop.close()


def load(folder: Path) -> Any:
    source = ModelSource(id="tiny", location=str(folder))
    return load_pipeline(find_model(source, safety_checker=False), torch.float32)


@pytest.mark.parametrize("kind", ["KolorsPipeline", "KolorsPAGPipeline"])
def test_a_class_whose_package_is_not_installed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_kolors(tmp_path)
    edit_index(folder, _class_name=kind)
    # What diffusers offers in place of a class that it cannot import.
    monkeypatch.setattr(diffusers, kind, getattr(without, kind))
    with pytest.raises(StartupError) as caught:
        load(folder)
    assert f"is a {kind}, which needs the package sentencepiece; install it" in str(caught.value)
    monkeypatch.undo()
    edit_index(folder, _class_name="KolorsPipeline")
    assert type(load(folder)) is diffusers.KolorsPipeline


def test_kolors_does_without_a_negative_prompt_in_a_folder_that_asks_for_zeros(
    tmp_path: Path,
) -> None:
    """diffusers' pipeline fails on such a folder if it is given None."""
    folder = write_kolors(tmp_path)
    edit_index(folder, force_zeros_for_empty_prompt=True)
    loop = LoopUnderTest(config_for(folder))
    try:
        job = make_job("zeros", guidance_scale=5.0, scheduler=SchedulerName.MODEL)
        assert isinstance(loop.run(job)["zeros"], JobFinished)
    finally:
        loop.close()


def test_a_tokenizer_that_has_only_a_sentencepiece_model(tmp_path: Path) -> None:
    """As in the folders of PixArt."""
    folder = write_sigma(tmp_path / "model")
    tokenizer = folder / "tokenizer"
    for file in tokenizer.iterdir():
        file.unlink()
    save_sentencepiece(tokenizer / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}', "utf-8")
    read = load(folder).tokenizer
    ids = read("a red ring").input_ids
    assert ids[-1] == read.eos_token_id
    assert read.unk_token_id not in ids


def test_every_family_has_a_row_in_the_table() -> None:
    rows = read_table()
    assert {row["pipeline class"] for row in rows.values()} == {f"`{n}`" for n in registry.FAMILIES}
    for row in rows.values():
        family = registry.FAMILIES[row["pipeline class"].strip("`")]
        tasks = (family.own_task, *family.tasks)
        assert row["tasks"] == ", ".join(task.value.replace("_", " ") for task in tasks)
    # The other rows are compared with the code in test_family_parity and test_edit.
    described = {STABLE_DIFFUSION, "Stable Diffusion, inpainting", "SDXL, inpainting"}
    described |= {case.name for case in EDITING} - {case.name for case in CASES}
    assert rows.keys() - {case.name for case in CASES} == described


def test_the_row_of_stable_diffusion(shared_loop: LoopUnderTest, tiny_folder: Path) -> None:
    found = cells(shared_loop.models["tiny"].info, None, registry.family_of(load(tiny_folder)).size)
    check_row(STABLE_DIFFUSION, found)
    with pytest.raises(AssertionError):
        check_row(STABLE_DIFFUSION, {**found, "steps": "31"})
