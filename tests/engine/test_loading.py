"""Models that load, and the one-line error of those that do not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import structlog
import torch
from safetensors.torch import load_file

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import SampleProgress
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline
from darkroom_server.engine.loading.revision import revision_of

from .conftest import LoopUnderTest, config_for, make_job
from .folders import (
    TEXT,
    UNET,
    VAE,
    drop_weight,
    edit_index,
    edited,
    halve,
    pickle,
    reshape_weight,
    truncate,
    write_second_generation,
)
from .reference import Reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AGAIN = "copy or download it again"


def load(location: Path | str, **fields: Any) -> Any:
    source = ModelSource(id="model", location=str(location), **fields)
    return load_pipeline(find_model(source, safety_checker=False), torch.float32)


def line_of(location: Path | str, **fields: Any) -> str:
    """The operator's line; that it is one line, whatever is wrong, holds for all."""
    with pytest.raises(StartupError) as caught:
        load(location, **fields)
    line = str(caught.value)
    assert line == line.strip()
    assert "\n" not in line
    assert len(line) < 700
    return line


def test_a_folder(tiny_folder: Path) -> None:
    pipeline = load(tiny_folder)
    weights = load_file(tiny_folder / UNET)
    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())
    assert not pipeline.unet.training


def test_a_home_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    load(f"~/{tiny_folder.name}")
    assert "does not exist" in line_of("~/elsewhere")


def test_a_variant(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "half", halve)
    found = load(folder, variant="fp16").unet.state_dict()["conv_in.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, load_file(tiny_folder / UNET)["conv_in.weight"].half().float())
    assert "unet cannot be loaded" in line_of(folder)
    assert line_of(tiny_folder, variant="fp16").endswith("leave --variant out")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "give the folder of a pipeline"),
    "index": (lambda f: (f / "model_index.json").write_text("{nope"), f"is damaged; {AGAIN}"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "is damaged"),
    "config": (lambda f: (f / "unet/config.json").write_text("{nope"), f"its unet .*; {AGAIN}"),
    "no part": (lambda f: shutil.rmtree(f / "unet"), f"no weights of its unet; {AGAIN}"),
    "no unet": (lambda f: (f / UNET).unlink(), f"no weights of its unet; {AGAIN}"),
    "no text encoder": (lambda f: (f / TEXT).unlink(), f"of its text_encoder; {AGAIN}"),
    "truncated unet": (lambda f: truncate(f / UNET), f"its unet cannot .*; {AGAIN}"),
    "truncated text": (lambda f: truncate(f / TEXT), f"its text_encoder cannot .*; {AGAIN}"),
    "no bytes": (lambda f: (f / VAE).write_bytes(b""), f"its vae cannot .*; {AGAIN}"),
    "pickle": (lambda f: pickle(f / UNET), "are not read; convert them to safetensors"),
    "pickled text": (lambda f: pickle(f / TEXT), "its text_encoder has weights in pickle"),
    "unet lacks": (lambda f: drop_weight(f / UNET, "conv_in.weight"), "lacks 1 .* conv_in.weight"),
    "text lacks": (lambda f: drop_weight(f / TEXT, _final_norm(f)), "its text_encoder lacks 1"),
    "other shape": (lambda f: reshape_weight(f / UNET, "conv_in.weight"), "its unet cannot"),
    "other text": (lambda f: reshape_weight(f / TEXT, _final_norm(f)), "its text_encoder cannot"),
    "no vocabulary": (lambda f: shutil.rmtree(f / "tokenizer"), f"no vocabulary .*; {AGAIN}"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), f"cannot be loaded .*; {AGAIN}"),
    "unknown class": (
        lambda f: edit_index(f, _class_name="StableDiffusion9Pipeline"),
        "is a StableDiffusion9Pipeline, which diffusers .* does not know",
    ),
    "no class": (lambda f: edit_index(f, _class_name=None), f"names no class; {AGAIN}"),
    "own code": (lambda f: edit_index(f, unet=["my_unet", "Net"]), "a my_unet.Net, which is not"),
}


def _final_norm(folder: Path) -> str:
    return next(key for key in load_file(folder / TEXT) if "final_layer_norm.weight" in key)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder(broken: str, tiny_folder: Path, tmp_path: Path) -> None:
    edit, words = BROKEN[broken]
    folder = edited(tiny_folder, tmp_path / "model", edit)
    line = line_of(folder)
    assert re.search(words, line), line
    assert str(folder) in line


@pytest.mark.parametrize("location", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(location: str) -> None:
    assert "does not exist: give" in line_of(location)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("location", ["owner/name", "name"])
def test_a_hub_that_cannot_be_reached(location: str, offline_hub: Path) -> None:
    line = line_of(location, token="hf_secret")
    assert line.endswith("check its name, HF_TOKEN and the network, or give a folder")
    assert "hf_secret" not in line


@pytest.fixture
def cached_hub(offline_hub: Path, tiny_folder: Path) -> Path:
    """The same with one model in the cache."""
    repository = offline_hub / "models--owner--name"
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return offline_hub


@pytest.mark.usefixtures("cached_hub")
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_hub_id_from_the_cache(revision: str | None) -> None:
    source = ModelSource(id="model", location="owner/name", revision=revision)
    assert revision_of(source, load("owner/name", revision=revision)) == COMMIT


@pytest.mark.usefixtures("cached_hub")
def test_without_an_answer_of_the_hub_its_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise TimeoutError("the hub said nothing for 10 s")

    monkeypatch.setattr(huggingface_hub, "model_info", silent)
    with structlog.testing.capture_logs() as lines:
        load("owner/name")
    assert [(line["event"], line["hub"]) for line in lines if "hub" in line] == [
        ("the hub's cache is used", "the hub said nothing for 10 s")
    ]
    assert "(the hub said nothing for 10 s); check its name" in line_of("owner/other")


def test_a_revision_is_of_what_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "model", lambda _: None)
    source = ModelSource(id="model", location=str(folder))
    before = revision_of(source, None)
    (folder / "whole.safetensors").write_bytes(b"the same in one file")
    assert revision_of(source, None) == before
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert revision_of(source, None) != before


def test_two_models_in_one_engine(tiny_folder: Path, tmp_path: Path) -> None:
    folders = {"tiny": tiny_folder, "second": write_second_generation(tmp_path)}
    sources = tuple(ModelSource(id=id, location=str(f)) for id, f in folders.items())
    loop = LoopUnderTest(config_for(tiny_folder, models=sources))
    try:
        jobs = [
            make_job(f"{id}-{i}", model=id, seed=i, steps=5 + i) for i in range(3) for id in folders
        ]
        loop.run(*jobs)
    finally:
        loop.close()
    available = {model.info.memory.available_bytes for model in loop.models.values()}
    assert len(available) == 1, "memory of the second model is not available to the first"
    references = {id: Reference(folder) for id, folder in folders.items()}
    for job in jobs:
        wanted = references[job.model].latents(job)
        error = (loop.latents[job.id, 0] - wanted).norm() / wanted.norm()
        assert error <= 1e-4, (job, error)
    progress = [e.job_id for e in loop.events if isinstance(e, SampleProgress)]
    last = {id: max(i for i, j in enumerate(progress) if j.startswith(id)) for id in folders}
    first = {id: min(i for i, j in enumerate(progress) if j.startswith(id)) for id in folders}
    assert first["second"] < last["tiny"], "they took turns"
    assert first["tiny"] < last["second"], "they took turns"
