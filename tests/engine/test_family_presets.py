"""What each family takes of a preset, on make-believe GPUs, and that its reasons are true."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from bench.tiny_families import CASES, ONE_EACH
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.core.events import BatchDone, JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.half_dtypes import (
    CLIPPED_IN_FLOAT16,
    HOLDS_IN_FLOAT16,
    LINEAR_ATTENTION,
    NOT_KNOWN_TO_HOLD,
    UNDESCRIBED,
)
from darkroom_server.engine.families.registry import FAMILIES, family_of
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline
from darkroom_server.engine.warmup.formats import HalfPrecision
from darkroom_server.engine.warmup.placement import convert
from darkroom_server.engine.warmup.presets import Runtime, resolve

from .conftest import LoopUnderTest, config_for, make_job
from .families.undescribed import write_amused

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
AMPERE, TURING = (8, 0), (7, 5)

UNETS = [family for family in FAMILIES.values() if not issubclass(family, TransformerFamily)]
TRANSFORMERS = [family for family in FAMILIES.values() if issubclass(family, TransformerFamily)]


def gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def runtime(half: HalfPrecision, **fields: Any) -> Runtime:
    return resolve(EngineConfig(models=(), **fields), half)


def name_of(family: type[Family]) -> str:
    return family.pipeline_class


@pytest.mark.parametrize("capability", [AMPERE, TURING])
@pytest.mark.parametrize("family", UNETS, ids=name_of)
def test_unets_keep_frugal(
    family: type[Family], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability)
    found = runtime(family.half)
    assert (found.preset, found.dtype) == (Preset.FRUGAL, torch.float16)
    assert (found.attention, found.slice_size, found.autocast) == (Attention.SLICED, "auto", True)
    assert found.preset_rule == "the default on a GPU"
    assert found.risks == ()


@pytest.mark.parametrize("preset", [Preset.AUTO, Preset.FRUGAL, Preset.FAST, Preset.TINY])
@pytest.mark.parametrize("family", TRANSFORMERS, ids=name_of)
def test_transformers_run_in_bfloat16_without_slices(
    family: type[Family], preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, AMPERE)
    found = runtime(family.half, preset=preset)
    frugal = preset in (Preset.AUTO, Preset.FRUGAL)
    assert (found.dtype, found.attention) == (torch.bfloat16, Attention.SDPA)
    assert found.autocast is (frugal and not family.half.autocast_risk)
    assert found.slice_size == ""
    assert ("the model's cannot be sliced" in found.preset_rule) is frugal
    assert ("the default on a GPU" in found.preset_rule) is (preset is Preset.AUTO)
    assert ("autocast is off" in found.preset_rule) is (frugal and bool(family.half.autocast_risk))
    assert "the GPU has bfloat16 (compute capability 8.0)" in found.format_rule
    assert found.risks == ()


@pytest.mark.parametrize("family", TRANSFORMERS, ids=name_of)
def test_a_gpu_without_bfloat16(family: type[Family], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, TURING)
    found = runtime(family.half)
    holds = family.half is HOLDS_IN_FLOAT16
    assert found.dtype is (torch.float16 if holds else torch.float32)
    assert "the GPU has no bfloat16" in found.format_rule
    assert "compute capability 7.5" in found.format_rule
    assert not found.autocast, "it would compute in what was just avoided"
    assert "autocast is off" in found.preset_rule


@pytest.mark.parametrize(
    ("capability", "fields", "risk"),
    [
        (AMPERE, {"dtype": Dtype.FLOAT16}, "--dtype float16: the model's values overflow"),
        (AMPERE, {"attention": Attention.SLICED}, "--attention sliced: the model's attention"),
        (TURING, {"dtype": Dtype.BFLOAT16}, "--dtype bfloat16: the GPU has no bfloat16"),
        (TURING, {"autocast": True}, "--autocast: the GPU has no bfloat16"),
        (AMPERE, {"dtype": Dtype.FLOAT16, "autocast": True}, "text encoders such as T5"),
    ],
)
def test_what_is_configured_is_in_force_and_its_risk_is_known(
    capability: tuple[int, int],
    fields: dict[str, Any],
    risk: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, capability)
    found = runtime(CLIPPED_IN_FLOAT16, **fields)
    assert any(risk in each for each in found.risks), found.risks
    if "dtype" in fields:
        assert str(found.dtype) == f"torch.{fields['dtype']}"
        assert found.format_rule == "the memory layout of preset frugal"
    if fields.get("autocast"):
        assert found.autocast
    assert found.attention is Attention.SDPA, "which cannot be overridden: there is nothing else"
    assert not runtime(HalfPrecision(), **fields).risks or capability == TURING


def test_float32_weights_are_autocast_to_the_familys_half(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, AMPERE)
    for half in (CLIPPED_IN_FLOAT16, HalfPrecision()):
        found = runtime(half, dtype=Dtype.FLOAT32)
        assert (found.autocast, found.half) == (True, half.dtype)


def test_a_pipeline_that_nobody_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_amused(tmp_path / "amused")
    files = find_model(ModelSource(id="x", location=str(folder)), safety_checker=False)
    gpu(monkeypatch, AMPERE)
    found = runtime(files.family.half)
    assert (found.dtype, found.attention) == (torch.bfloat16, Attention.SDPA)
    assert not found.autocast
    assert "autocast is off: it is not known what the pipeline must" in found.preset_rule


def denoiser_class(family: type[Family]) -> Any:
    """The class of the denoiser, by the annotations of the pipeline."""
    pipeline = getattr(diffusers, family.pipeline_class)
    annotation = inspect.signature(pipeline.__init__).parameters[family.denoiser_name].annotation
    return getattr(diffusers, str(getattr(annotation, "__name__", annotation)).split(".")[-1])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=name_of)
def test_the_reasons_are_those_of_diffusers_code(family: type[Family]) -> None:
    denoiser = denoiser_class(family)
    assert family.half.slices_attention is hasattr(denoiser, "set_attention_slice")
    module = sys.modules[denoiser.__module__]
    linear = SanaLinearAttnProcessor2_0 in vars(module).values()
    clips = "clip(-65504, 65504)" in inspect.getsource(
        SanaLinearAttnProcessor2_0 if linear else module
    )
    assert clips is (family.half in (CLIPPED_IN_FLOAT16, LINEAR_ATTENTION))
    assert linear is (family.half is LINEAR_ATTENTION)
    if family in TRANSFORMERS and not clips:
        pipeline = sys.modules[getattr(diffusers, family.pipeline_class).__module__]
        in_float16 = "torch_dtype=torch.float16" in inspect.getsource(pipeline)
        assert in_float16 is (family.half is HOLDS_IN_FLOAT16)


class Products(TorchDispatchMode):
    """The dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_undoes_the_float32_of_linear_attention(autocast: bool) -> None:
    layer = AttentionLayer(query_dim=16, heads=2, dim_head=8, out_bias=True).bfloat16()
    layer.set_processor(SanaLinearAttnProcessor2_0())
    enabled = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with torch.no_grad(), enabled, Products() as products:
        layer(torch.randn(1, 4, 16, dtype=torch.bfloat16))
    assert products.dtypes == [torch.bfloat16 if autocast else torch.float32] * 2


def in_words(half: HalfPrecision, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells of the page's table that the code decides."""
    found = {}
    for capability in (AMPERE, TURING):
        gpu(monkeypatch, capability)
        found[capability] = runtime(half, preset=Preset.FRUGAL)
    sliced = found[AMPERE].attention is Attention.SLICED
    return [
        found[AMPERE].dtype_name,
        found[TURING].dtype_name,
        "the preset's" if sliced else "SDPA",
        "yes" if found[AMPERE].autocast else "no",
    ]


def test_the_page_has_a_row_for_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["family", "weights on a GPU"])
    table = {row[0]: row[1:5] for row in rows[start + 2 : start + 8]}
    wanted = {family.pipeline_class: family.half for family in TRANSFORMERS}
    for text, cells in table.items():
        names = [name for name in wanted if f"`{name}`" in text]
        halves = {wanted.pop(name) for name in names}
        if "UNets" in text:
            halves = {family.half for family in UNETS}
        elif "other transformers" in text:
            halves = {NOT_KNOWN_TO_HOLD}
        elif "nobody described" in text:
            halves = {UNDESCRIBED}
        assert [cells] == [in_words(half, monkeypatch) for half in halves], text
    assert set(wanted.values()) <= {NOT_KNOWN_TO_HOLD}, "which are the other transformers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models' folders, written when they are needed."""
    return {}


def folder_of(case: FamilyCase, folders: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    if case.name not in folders:
        folders[case.name] = case.write(factory.mktemp("model") / "model")
    return folders[case.name]


def case_named(name: str) -> FamilyCase:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
@pytest.mark.parametrize("autocast", [None, False])
def test_a_batch_in_half_precision(
    case: FamilyCase,
    autocast: bool | None,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As the preset says, and without autocast, as with ``fast``; rows of two jobs are merged."""
    config = config_for(
        folder_of(case, folders, tmp_path_factory),
        preset=Preset.FRUGAL,
        dtype=Dtype.AUTO,
        attention=None,
        autocast=autocast,
        rows=8,
    )
    loop = LoopUnderTest(config)
    try:
        info = loop.models["tiny"].info
        size = {"width": info.defaults.width, "height": info.defaults.height}
        usual = {**size, "scheduler": SchedulerName.MODEL, **case.jobs[0]}
        jobs = [make_job(f"half-{i}", **{**usual, "seed": i, "steps": 3}) for i in range(2)]
        ends = loop.run(*jobs)
    finally:
        loop.close()
    assert info.runtime.dtype == "bfloat16"
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert any(isinstance(e, BatchDone) and e.samples > 1 for e in loop.events)


@pytest.mark.parametrize(
    ("name", "part", "dtype"),
    [
        ("Qwen-Image", "text_encoder", torch.bfloat16),
        ("Z-Image", "text_encoder", torch.bfloat16),
        ("PixArt-Sigma", "text_encoder", torch.float16),
    ],
)
def test_what_libraries_keep_in_float32_stays_there(
    name: str,
    part: str,
    dtype: torch.dtype,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Frequencies of rotary embeddings, and weights of T5; a conversion would round them."""

    def in_float32(pipeline: Any) -> set[str]:
        module = getattr(pipeline, part)
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {name for name, tensor in tensors if tensor.dtype == torch.float32}

    folder = folder_of(case_named(name), folders, tmp_path_factory)
    files = find_model(ModelSource(id="x", location=str(folder)), safety_checker=False)
    pipeline = load_pipeline(files, dtype)
    kept = in_float32(pipeline)
    assert kept
    found = runtime(files.family.half, device="cpu", preset=Preset.FRUGAL)
    convert(family_of(pipeline), replace(found, dtype=dtype))
    assert in_float32(pipeline) == kept
    pipeline.to(dtype=dtype)
    assert not in_float32(pipeline), "what the test would not notice otherwise"
