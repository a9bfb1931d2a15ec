"""Compiled denoisers: which calls they take, when they replace the eager one, and when not.

The toolchain is a fake one. Its results call the eager denoiser and add an error that is too small
to be rejected, so the images say which form made them.
"""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.core.engine_config import Compile, Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.core.events import DenoiserCompiled, SampleProgress
from darkroom_server.core.inputs import Lora
from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.forms.compiled import CompiledDenoiser
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.signature import (
    EXAMPLE_ROWS,
    FEWER_ROWS,
    Kinds,
    OtherArguments,
    Signature,
    TensorKind,
    Values,
    kinds_of,
    largest_error,
    nested,
)
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import CompileFailed

from .conftest import LoopUnderTest, config_for, make_job
from .tiny import write_tiny_model


class FakeToolchain:
    """``rows`` are those of each call of what it loaded. ``go`` lets compiles end."""

    def __init__(self, *, lacks: str = "", fails: str = "", error: float = 1e-4) -> None:
        self.lacks, self.fails, self.error = lacks, fails, error
        self.compiled: list[str] = []
        self.rows: list[int] = []
        self.go = threading.Event()
        self.closed = False

    def missing(self, task: CompileTask) -> str:
        return self.lacks

    def compile(self, task: CompileTask, file: Path) -> None:
        assert self.go.wait(60)
        self.compiled.append(task.digest)
        if self.fails or self.closed:
            raise CompileFailed(self.fails)
        file.write_text(task.description)

    def load(self, task: CompileTask, file: Path, denoiser: Any) -> CompiledDenoiser:
        assert file.read_text() == task.description

        def run(values: Values) -> Any:
            sample: torch.Tensor = values["sample"]
            self.rows.append(len(sample))
            found: torch.Tensor = denoiser(**nested(task.kinds, values))[0]
            return (found * (1 + self.error),)

        return CompiledDenoiser(run, 2, 8)

    def close(self) -> None:
        self.closed = True
        self.go.set()


def compiling(folder: Path, cache: Path, when: Compile | None, **fields: Any) -> EngineConfig:
    return config_for(folder, compile=when, compile_cache=str(cache), **fields)


class Served:
    """A loop whose denoiser may be compiled by ``toolchain``."""

    def __init__(self, config: EngineConfig, toolchain: FakeToolchain) -> None:
        self.toolchain = toolchain
        with structlog.testing.capture_logs() as self.logs:
            self.loop = LoopUnderTest(config, toolchain)

    @property
    def form(self) -> Any:
        return self.loop.models["tiny"].info.runtime.denoiser

    def end_compile(self) -> None:
        self.toolchain.go.set()
        self.loop.wait_for(lambda: DenoiserCompiled("tiny") in self.loop.events)

    def image(self, id: str, **fields: Any) -> bytes:
        self.loop.run(make_job(id, **fields))
        return self.loop.image(id).image.data


@pytest.fixture
def toolchain() -> FakeToolchain:
    return FakeToolchain()


@pytest.fixture
def served(tiny_folder: Path, tmp_path: Path, toolchain: FakeToolchain) -> Any:
    """A server that compiles in the background, at most four rows a batch."""
    found = Served(compiling(tiny_folder, tmp_path, Compile.BACKGROUND, rows=4), toolchain)
    yield found
    toolchain.go.set()
    found.loop.close()


def test_it_serves_at_once_and_is_replaced_when_the_compile_ends(served: Served) -> None:
    toolchain = served.toolchain
    served.image("eager")
    assert served.form == "eager"
    assert toolchain.rows == []
    served.end_compile()
    assert served.form is DenoiserForm.COMPILED
    assert toolchain.rows == [2, 3, 5], "compared with the eager form first"
    served.image("compiled")
    assert toolchain.rows[3:] == [2] * 6
    eager, compiled = (served.loop.latents[id, 0] for id in ("eager", "compiled"))
    assert 0 < (eager - compiled).norm() / eager.norm() < 0.01, "another form, the same image"


def test_an_image_that_runs_meanwhile_goes_on(served: Served) -> None:
    def end_compile(event: object) -> None:
        if isinstance(event, SampleProgress):
            served.toolchain.go.set()

    served.loop.on_event = end_compile
    # It runs until the compiled form takes its steps.
    served.loop.loop.submit(make_job("long", steps=150))
    served.loop.wait_for(lambda: DenoiserCompiled("tiny") in served.loop.events)
    served.loop.wait_for(lambda: "long" in served.loop.ends)
    events = served.loop.events
    before = [e for e in events[: events.index(DenoiserCompiled("tiny"))] if is_step(e)]
    after = [e for e in events[events.index(DenoiserCompiled("tiny")) :] if is_step(e)]
    assert len(before) + len(after) == 150
    assert 0 < len(after) <= len(served.toolchain.rows[3:]) + 1


def is_step(event: object) -> bool:
    return isinstance(event, SampleProgress)


def test_exact_images_and_lone_rows_stay_eager(served: Served) -> None:
    before = served.image("before", exact=True)
    plain = served.image("plain before")
    served.end_compile()
    tried = len(served.toolchain.rows)
    assert served.image("after", exact=True) == before
    assert len(served.toolchain.rows) == tried
    served.image("unguided", guidance_scale=1.0)
    assert len(served.toolchain.rows) == tried, "one row is not compiled"
    # The control: a plain image is made by the compiled form.
    served.image("plain after")
    assert len(served.toolchain.rows) == tried + 6
    assert plain


def test_batches_of_several_images_are_compiled(served: Served) -> None:
    served.end_compile()
    tried = len(served.toolchain.rows)
    served.loop.run(*(make_job(f"{i}", seed=i, steps=30) for i in range(2)))
    assert 4 in served.toolchain.rows[tried:]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "the compile fails": ({"fails": "no such header"}, "no such header"),
    "no compiler": ({"lacks": "there is no C++ compiler"}, "there is no C++ compiler"),
    "wrong values": ({"error": 0.01}, "its output is wrong"),
    "no values": ({"error": float("nan")}, "its output is wrong"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_without_a_result_it_stays_eager_and_says_why(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    how, why = FAILURES[name]
    toolchain = FakeToolchain(**how)
    toolchain.go.set()
    served = Served(compiling(tiny_folder, tmp_path, Compile.BLOCKING), toolchain)
    try:
        assert served.form is DenoiserForm.EAGER
        served.image("image")
        assert toolchain.rows in ([], [2]), "the trial at most"
    finally:
        served.loop.close()
    (line,) = [log for log in served.logs if "eager" in log["event"]]
    assert line["log_level"] == "warning"
    assert why in line["why"]
    assert not list(tmp_path.glob("*.pt2")), "what is of no use is not kept"


def test_a_lacking_compiler_is_reported_once(tiny_folder: Path, tmp_path: Path) -> None:
    models = tuple(ModelSource(id=id, location=str(tiny_folder)) for id in ("tiny", "second"))
    config = compiling(tiny_folder, tmp_path, Compile.BACKGROUND, rows=2, models=models)
    served = Served(config, FakeToolchain(lacks="there is no C++ compiler"))
    served.loop.close()
    assert [log["event"] for log in served.logs].count("denoisers stay eager") == 1


@pytest.mark.parametrize(
    ("when", "fields", "used"),
    [
        (None, {"preset": Preset.FAST}, True),
        (Compile.CACHED, {}, True),
        (Compile.BACKGROUND, {}, True),
        (Compile.OFF, {"preset": Preset.FAST}, False),
        (None, {"preset": Preset.TINY}, False),
        (Compile.CACHED, {"threads": 2}, False),
        (Compile.CACHED, {"dtype": Dtype.BFLOAT16}, False),
        (Compile.CACHED, {"channels_last": True}, False),
        (Compile.CACHED, {"autocast": True}, False),
    ],
)
def test_the_next_start_has_it_at_once(
    when: Compile | None,
    fields: dict[str, Any],
    used: bool,
    tiny_folder: Path,
    cache: Path,
) -> None:
    """If it is for the same denoiser, format, threads and versions."""
    toolchain = FakeToolchain()
    served = Served(compiling(tiny_folder, cache, when, **{"rows": 2, **fields}), toolchain)
    served.loop.close()
    assert served.form is (DenoiserForm.COMPILED if used else DenoiserForm.EAGER)
    assert toolchain.compiled == []


@pytest.fixture(scope="module")
def cache(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the denoiser of the tiny model, which a server compiled at its start."""
    folder = tmp_path_factory.mktemp("compiled")
    toolchain = FakeToolchain()
    toolchain.go.set()
    served = Served(compiling(tiny_folder, folder, Compile.BLOCKING, rows=2), toolchain)
    served.loop.close()
    assert served.form is DenoiserForm.COMPILED
    assert len(toolchain.compiled) == 1
    return folder


def test_fine_tunes_share_it(tmp_path: Path, cache: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned = write_tiny_model(tmp_path / "tuned")
    file = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file)
    served = Served(compiling(tuned, cache, Compile.CACHED, rows=2), FakeToolchain())
    served.loop.close()
    assert served.form is DenoiserForm.COMPILED


def test_a_server_that_closes_ends_the_compile(served: Served) -> None:
    served.loop.close()
    assert served.toolchain.closed
    assert DenoiserCompiled("tiny") not in served.loop.events


# ---- which calls a compiled denoiser takes ----

HALF = torch.bfloat16
KINDS: Kinds = {
    "sample": TensorKind((None, 4, 8, 8), HALF),
    "timestep": TensorKind((None,), torch.float32),
    "states": TensorKind((None, 77, 16), HALF),
    "added.ids": TensorKind((None, 6), HALF),
    "positions": TensorKind((64, 3), torch.float32),
    "return_dict": False,
}


def call(rows: int, **fields: Any) -> dict[str, Any]:
    usual = {
        "sample": torch.rand(rows, 4, 8, 8).to(HALF),
        "timestep": torch.rand(rows),
        "states": torch.rand(rows, 77, 16).to(HALF),
        "added": {"ids": torch.rand(rows, 6).to(HALF), "unused": None},
        "positions": torch.rand(64, 3),
        "return_dict": False,
        "guidance": None,
    }
    return {**usual, **fields}


SIGNATURE = Signature(KINDS, torch.channels_last)


def test_tensors_lie_in_memory_as_it_was_compiled_for() -> None:
    pair = torch.rand(1, 4, 8, 8).to(HALF).expand(2, -1, -1, -1)
    strided = torch.rand(2, 16, 77).to(HALF).transpose(1, 2)
    found = SIGNATURE.arranged(call(2, sample=pair, states=strided))
    assert found is not None
    assert found["sample"].is_contiguous(memory_format=torch.channels_last)
    assert found["sample"].stride() == (256, 1, 32, 4)
    assert torch.equal(found["sample"], pair)
    assert found["states"].is_contiguous()
    assert torch.equal(found["states"], strided)


@pytest.mark.parametrize("timestep", [torch.tensor(981), torch.tensor(981.0), 981])
def test_one_timestep_is_that_of_all_rows(timestep: Any) -> None:
    found = SIGNATURE.arranged(call(3, timestep=timestep))
    assert found is not None
    assert torch.equal(found["timestep"], torch.full((3,), 981.0))
    assert found["timestep"].stride() == (1,)


@pytest.mark.parametrize(
    "given",
    [
        call(2, states=torch.rand(2, 78, 16).to(HALF)),
        call(2, states=torch.rand(2, 77, 16)),
        call(2, states=torch.rand(3, 77, 16).to(HALF)),
        call(2, positions=torch.rand(63, 3)),
        call(2, return_dict=True),
        call(2, down_block_additional_residuals=[torch.rand(2, 4)]),
        call(2, added={}),
        call(2, added={"ids": torch.rand(2, 6).to(HALF), "image_embeds": [torch.rand(2, 1, 4)]}),
        call(2, sample=[torch.rand(4, 8, 8)] * 2),
    ],
)
def test_it_takes_no_other_calls(given: dict[str, Any]) -> None:
    assert SIGNATURE.arranged(call(2)) is not None, "the control"
    assert SIGNATURE.arranged(given) is None


@pytest.mark.parametrize(
    ("fields", "eager"),
    [
        ({}, False),
        ({"exact": True}, True),
        ({"loras": (Lora(id="outline", scale=0.5),)}, True),
        ({"loras": (Lora(id="outline", scale=0.0),)}, False),
    ],
)
def test_one_exact_or_adapted_row_makes_a_batch_eager(fields: dict[str, Any], eager: bool) -> None:
    forms = DenoiserForms(
        denoiser=lambda **_: "eager",
        dtype=HALF,
        signature=SIGNATURE,
        inputs=call,
        other=CompiledDenoiser(lambda _: "compiled", 2, 8),
    )
    jobs = [make_job("a"), dataclasses.replace(make_job("b"), **fields)]
    samples: list[Any] = [SimpleNamespace(job=job) for job in jobs]
    assert [forms.run(call(rows), samples) for rows in (1, 2, 8, 9)] == [
        "eager",
        *["eager" if eager else "compiled"] * 2,
        "eager",
    ]


def test_kinds_are_found_from_two_numbers_of_rows() -> None:
    assert kinds_of(call(FEWER_ROWS), call(EXAMPLE_ROWS)) == KINDS
    lists = [call(rows, sample=[torch.rand(4, 8)] * rows) for rows in (FEWER_ROWS, EXAMPLE_ROWS)]
    with pytest.raises(OtherArguments, match="sample is a list"):
        kinds_of(*lists)
    pairs = [call(rows, states=torch.rand(2 * rows, 4)) for rows in (FEWER_ROWS, EXAMPLE_ROWS)]
    with pytest.raises(OtherArguments, match="states has 16 entries for 8 rows"):
        kinds_of(*pairs)
    alone = [{"positions": torch.rand(64, 3)}] * 2
    with pytest.raises(OtherArguments, match="no argument has the rows"):
        Signature(kinds_of(*alone), torch.contiguous_format)


def test_what_is_compared_differs_in_each_row() -> None:
    same = call(4, **{name: torch.ones_like(call(4)[name]) for name in ("sample", "timestep")})
    found = SIGNATURE.distinct_rows(same, torch.Generator().manual_seed(0))
    assert len(found["timestep"].unique()) == 4
    assert len(found["sample"][:, 0, 0, 0].unique()) == 4
    assert found["added"]["ids"].shape == (4, 6)
    assert torch.equal(found["positions"], same["positions"]), "the same for all rows"
    assert "guidance" not in found


def test_the_error_is_that_of_the_worst_row() -> None:
    expected = torch.ones(3, 4)
    found = expected.clone()
    found[1] *= 1.5
    assert largest_error(found, expected) == pytest.approx(0.5)
    assert largest_error(expected.clone(), expected) == 0
    assert largest_error(expected[:2], expected) == float("inf")
    assert largest_error(expected.double(), expected) == float("inf")
    assert not largest_error(found * float("nan"), expected) <= 1
    swapped = torch.arange(12.0).view(3, 4)
    assert largest_error(swapped[[1, 0, 2]], swapped) > 0.4
