"""Graphs whose rows have adapters: any adapters run in one graph, and equal the eager form.

A fake graph is a plain call that reads and writes the same memory each time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import structlog
import torch

from darkroom_server.core.engine_config import AdapterSource, Preset
from darkroom_server.core.inputs import Lora
from darkroom_server.engine.adapters.module import AdaptedModule
from darkroom_server.engine.adapters.weights import LayerWeights, Mix
from darkroom_server.engine.forms.adapted_graphs import RECORDED_AFTER, AdaptedGraphs
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.graphs import GraphedDenoiser, _recorded
from darkroom_server.engine.forms.signature import Signature, kinds_of

from .adapter_files import random_layers, write_adapter
from .conftest import make_job
from .fake_cuda import FakeDevice
from .quantized import difference
from .test_graphs import FakeRecorder, call, generate

LAYERS = ("tokens", "image", "narrow")


class Denoiser(torch.nn.Module):
    """A linear layer over tokens, and convolutions, one of which has a stride."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.nn.Linear(4, 4)
        self.image = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.narrow = torch.nn.Conv2d(4, 4, 2, stride=2)
        self.float()

    def forward(self, sample: Any, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        found = self.image(sample) * timestep.view(-1, 1, 1, 1)
        tokens = self.tokens(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (tokens + self.narrow(sample).repeat_interleave(2, 2).repeat_interleave(2, 3),)


def adapter(denoiser: Denoiser, *, rank: int, seed: int, layers: tuple[str, ...] = LAYERS) -> Any:
    return {
        name: LayerWeights(down=down, up=up)
        for name, (down, up) in random_layers(denoiser, layers, rank, seed).items()
    }


class Graphs:
    """A denoiser with graphs for 2, 4 and 8 rows, and up to ``slots`` adapters at once."""

    def __init__(self, recorder: FakeRecorder | None = None, slots: int = 2) -> None:
        self.recorder = recorder or FakeRecorder()
        self.denoiser = Denoiser()
        self.module = AdaptedModule(
            self.denoiser, slots=slots, dtype=torch.float32, row_layers=LAYERS
        )
        self.forms = DenoiserForms(
            denoiser=self.denoiser,
            dtype=torch.float32,
            signature=Signature(kinds_of(call(7), call(8)), torch.contiguous_format),
            inputs=call,
            graph_rows=(2, 4, 8),
        )
        with torch.inference_mode():
            found = _recorded("tiny", self.forms, self.recorder)
        assert isinstance(found, GraphedDenoiser)
        self.run_adapted = AdaptedGraphs("tiny", self.forms, found, self.module).run
        self.recorder.recorded.clear()
        self.recorder.replayed.clear()
        self.weights = {
            "a": adapter(self.denoiser, rank=2, seed=1),
            "b": adapter(self.denoiser, rank=4, seed=2),
        }

    def run(self, *mixes: Mix, seed: int = 0) -> torch.Tensor | None:
        """What a graph gives for rows with ``mixes``, compared with the eager form; None: none."""
        given = call(len(mixes), seed)
        values = self.forms.signature.arranged(given)
        assert values is not None
        with torch.inference_mode(), self.module.rows(mixes, self.weights):
            found = self.run_adapted(values)
            wanted = self.denoiser(**given)[0]
        with torch.inference_mode():
            self.forms.record_pending()
        if found is not None:
            torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
        return None if found is None else found[0]

    def record(self, *mixes: Mix) -> None:
        """Run batches until their graph is there."""
        assert all(self.run(*mixes) is None for _ in range(RECORDED_AFTER))


A: Mix = (("a", 1.0),)
B: Mix = (("b", 0.5),)
BOTH: Mix = (("a", 0.7), ("b", -0.3))
NONE: Mix = ()


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def test_one_graph_serves_rows_with_any_adapters(graphs: Graphs) -> None:
    graphs.record(A, NONE, BOTH)
    assert graphs.recorder.recorded == [4]
    graphs.recorder.replayed.clear()
    batches: Sequence[tuple[Mix, ...]] = (
        (A, NONE, BOTH),
        (BOTH, BOTH, BOTH, BOTH),
        (NONE, BOTH, B, A),
        (BOTH, A, NONE),
        (A, NONE, BOTH),
    )
    outputs = [graphs.run(*mixes, seed=9) for mixes in batches]
    assert graphs.recorder.replayed == [4] * len(batches)
    first, *others, last = (each for each in outputs if each is not None)
    assert torch.equal(first, last)
    # The control: what rows have shows.
    assert all(float((each[:3] - first).abs().max()) > 0.01 for each in others)


def test_graphs_are_recorded_by_rows_and_most_adapters_of_a_row(graphs: Graphs) -> None:
    graphs.record(A, B)
    assert graphs.run(A, A) is not None
    assert graphs.run(BOTH, NONE) is None, "a row has two"
    assert graphs.run(A, A, A) is None, "more rows"
    assert graphs.recorder.recorded == [2]
    assert graphs.run(NONE, NONE) is None, "no row has any: another graph's business"


def test_an_adapter_in_the_slot_of_another_needs_no_new_graph() -> None:
    graphs = Graphs(slots=1)
    graphs.weights["c"] = adapter(graphs.denoiser, rank=2, seed=3)
    graphs.record(A, A)
    with_a = graphs.run(A, A)
    with_c = graphs.run((("c", 1.0),), (("c", 1.0),))
    assert with_a is not None
    assert with_c is not None
    assert float((with_a - with_c).abs().max()) > 0.01
    assert graphs.recorder.recorded == [2]


def test_weights_that_move_need_new_graphs(graphs: Graphs) -> None:
    graphs.record(A, A)
    assert graphs.run(A, A) is not None
    # A higher rank: all weights of a layer move.
    assert graphs.run(B, B) is None
    assert graphs.run(A, A) is None
    for _ in range(RECORDED_AFTER - 2):
        assert graphs.run(A, B) is None
    assert graphs.run(A, B) is not None
    assert graphs.recorder.recorded == [2, 2]


def test_a_first_adapter_for_a_layer_needs_new_graphs() -> None:
    graphs = Graphs()
    graphs.weights["a"] = adapter(graphs.denoiser, rank=2, seed=1, layers=("image",))
    graphs.record(A, A)
    assert graphs.run(A, A) is not None
    graphs.weights["b"] = adapter(graphs.denoiser, rank=2, seed=2, layers=("tokens", "narrow"))
    assert graphs.run(A, B) is None
    for _ in range(RECORDED_AFTER - 1):
        assert graphs.run(A, B) is None
    assert graphs.run(B, A) is not None


def test_an_adapter_that_shares_no_batch_runs_eagerly(graphs: Graphs) -> None:
    dora = LayerWeights(down=torch.randn(2, 4), up=torch.randn(4, 2), magnitude=torch.rand(4) + 0.5)
    graphs.weights["a"] = {"tokens": dora}
    for _ in range(RECORDED_AFTER + 1):
        assert graphs.run(A, A) is None
    assert graphs.recorder.recorded == []


class Broken(FakeRecorder):
    """From ``fails`` on, its graphs are wrong, or do not fit the memory."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.fails, self._wrong = False, wrong

    def record(self, call: Any) -> Any:
        self.stale = self.fails and self._wrong
        self.limit = 0 if self.fails and not self._wrong else 64
        return super().record(call)


@pytest.mark.parametrize(
    ("wrong", "why"), [(True, "its output is wrong"), (False, "no memory")], ids=["wrong", "memory"]
)
def test_without_a_graph_batches_stay_eager_and_the_log_says_so(wrong: bool, why: str) -> None:
    recorder = Broken(wrong=wrong)
    graphs = Graphs(recorder)
    recorder.fails = True
    with structlog.testing.capture_logs() as logs:
        for _ in range(RECORDED_AFTER * 3):
            assert graphs.run(A, BOTH, B) is None
    (line,) = logs
    assert line["event"] == "batches with adapters stay eager"
    assert why in line["why"]


def test_an_engine_runs_graphs_with_adapters(
    tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    sources = tuple(
        AdapterSource(
            id=id,
            location=str(write_adapter(tmp_path / f"{id}.safetensors", pipeline, seed=seed)),
        )
        for seed, id in enumerate("ab")
    )
    loras = {"a": (Lora(id="a"),), "b": (Lora(id="b", scale=0.5),), "plain": ()}
    recorder = FakeRecorder()
    jobs = [make_job(id, loras=mix, steps=20) for id, mix in loras.items()]
    jobs.append(make_job("exact", loras=loras["a"], steps=6, exact=True))
    _, found = generate(tiny_folder, Preset.MAX, recorder, *jobs, adapters=sources)
    _, eager = generate(tiny_folder, Preset.FAST, None, *jobs, adapters=sources)
    assert recorder.recorded[:4] == [4, 3, 2, 1]
    adapted = recorder.recorded[4:]
    assert adapted, "with adapters"
    assert found["exact"] == eager["exact"]
    assert difference(eager["a"], eager["b"]) > 2, "the control"
    for id in ("a", "b", "plain"):
        assert difference(found[id], eager[id]) < 1
