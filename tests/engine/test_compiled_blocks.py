"""Denoisers of which only the repeated blocks are compiled, because the whole cannot be."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from darkroom_server.engine.forms import compile_blocks, compile_process
from darkroom_server.engine.forms.compile_process import compile_denoiser
from darkroom_server.engine.forms.compiled_blocks import (
    MANIFEST,
    CompiledBlock,
    has_blocks,
    replaced,
)
from darkroom_server.engine.forms.exporting import example, row_range
from darkroom_server.engine.forms.signature import TensorKind, described, nested
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import Inductor

from .row_loop import LoopBlock, RowLoop

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8
KINDS: dict[str, Any] = {
    "sample": TensorKind((None, CHANNELS, 4, 4), torch.float32),
    "timestep": TensorKind((None,), torch.float32),
    "return_dict": False,
}
TASK: dict[str, Any] = {
    "device": "cpu",
    "rows": None,
    "module": RowLoop.__module__,
    "class": "RowLoop",
    "config": {"channels": CHANNELS, "depth": 3},
    "dtype": "float32",
    "other_dtypes": {},
    "channels_last": False,
    "arguments": {name: described(kind) for name, kind in KINDS.items()},
    "threads": 1,
}


def denoiser(**config: Any) -> Any:
    torch.manual_seed(0)
    return RowLoop(CHANNELS, **config).eval().requires_grad_(False)


def call(rows: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(rows)
    sample = torch.randn(rows, CHANNELS, 4, 4, generator=random)
    return {"sample": sample, "timestep": 1000 * torch.rand(rows, generator=random)}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were packaged, without the compiler's work."""
    found: list[Any] = []

    def package(program: Any, file: Path, rows: int | None = None) -> tuple[int, int]:
        taken = row_range(program) if rows is None else (rows, rows)
        found.append(program)
        file.write_bytes(b"compiled")
        return taken

    monkeypatch.setattr(compile_process, "write_package", package)
    monkeypatch.setattr(compile_blocks, "write_package", package)
    return found


def test_blocks_are_compiled_if_the_whole_cannot_be(tmp_path: Path, packages: list[Any]) -> None:
    file = tmp_path / "denoiser.pt2"
    compile_denoiser(TASK, file)
    assert has_blocks(file)
    assert len(packages) == 1, "all blocks are alike"
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read(MANIFEST))
    (package,) = manifest["packages"]
    assert package["blocks"] == ["blocks.0", "blocks.1", "blocks.2"]
    per_row = {"shape": [None, 1, 1], "dtype": "float32"}
    assert package["arguments"] == {
        "hidden": [{"shape": [None, 16, CHANNELS], "dtype": "float32"}],
        "shifts": [per_row, per_row],
        "mask": [{"value": None}],
    }
    assert (manifest["least_rows"], manifest["channels_last"]) == (2, False)
    assert manifest["most_rows"] > 16


def test_blocks_that_differ_are_compiled_apart() -> None:
    model = denoiser(depth=4)
    model.blocks[1].norm.eps = 0.1
    model.blocks[3].linear = torch.nn.Linear(CHANNELS, CHANNELS, bias=False)
    groups = compile_blocks.grouped_blocks(model, KINDS, torch.contiguous_format)
    assert [names for _, names in groups] == [["blocks.0", "blocks.2"], ["blocks.1"], ["blocks.3"]]


def test_without_repeated_blocks_the_error_is_that_of_the_whole(
    tmp_path: Path, packages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowLoop, "_repeated_blocks", ())
    with pytest.raises(ValueError, match="the graph is for 8 rows only"):
        compile_denoiser(TASK, tmp_path / "denoiser.pt2")
    assert packages == []


def test_if_neither_can_be_compiled_both_errors_are_reported(
    tmp_path: Path, packages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_blocks, "MOST_PACKAGES", 0)
    with pytest.raises(RuntimeError, match="8 rows only; neither can its blocks: it has blocks of"):
        compile_denoiser(TASK, tmp_path / "denoiser.pt2")


def test_for_one_number_of_rows_the_whole_is_compiled(tmp_path: Path, packages: list[Any]) -> None:
    """As for a graph of a GPU; for any number it cannot be, see above."""
    compile_denoiser({**TASK, "rows": 3}, tmp_path / "denoiser.pt2")
    (program,) = packages
    assert not program.range_constraints
    given = {name: example(kind, 3, torch.contiguous_format) for name, kind in KINDS.items()}
    named = nested(KINDS, given)
    assert program.module()(**named)[0].shape[0] == 3


class FakePackage:
    """Runs the block itself, and counts its calls."""

    def __init__(self, block: LoopBlock) -> None:
        self.calls = 0
        self._forward = block.forward
        example = {"hidden": 0, "shifts": (0, 0), "mask": None}
        self._specs = [
            pytree.treespec_dumps(pytree.tree_structure(structure))
            for structure in (((), example), (0, 0))
        ]

    def get_call_spec(self) -> list[str]:
        return self._specs

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        self.calls += 1
        assert all(each.is_contiguous() for each in tensors)
        hidden, first, last = tensors
        return [each * 2 for each in self._forward(hidden, (first, last))]


def test_a_compiled_block_takes_its_own_calls_only_and_while_it_is_asked_for() -> None:
    model = denoiser(depth=1)
    block = model.blocks[0]
    package = FakePackage(block)
    shape = TensorKind((None, 16, CHANNELS), torch.float32)
    per_row = TensorKind((None, 1, 1), torch.float32)
    arguments = {
        "hidden": [described(shape)],
        "shifts": [described(per_row)] * 2,
        "mask": [described(None)],
    }
    form = CompiledBlock(block, arguments, torch.contiguous_format, package)
    eager = model(**call(3))[0]
    with replaced([form]):
        compiled = model(**call(3))[0]
    assert package.calls == 1
    assert not torch.equal(compiled, eager)
    assert torch.equal(model(**call(3))[0], eager)
    assert package.calls == 1

    hidden, shift = torch.rand(2, 16, CHANNELS), torch.rand(2, 1, 1)
    others: list[tuple[Any, ...]] = [
        (torch.rand(2, 9, CHANNELS), (shift, shift), None),
        (hidden, (shift, shift.double()), None),
        (hidden, (shift[:1], shift), None),
        (hidden, [shift, shift], None),
        (hidden, (shift, shift), "mask"),
        (hidden, (shift, shift)),
    ]
    with replaced([form]):
        for other in others:
            block(*other)
        assert package.calls == 1
        block(hidden.transpose(0, 1).contiguous().transpose(0, 1), (shift, shift), None)
        assert package.calls == 2, "the control: strides are arranged"
    with pytest.raises(RuntimeError), replaced([form]):
        block(hidden[:, :, :3], (shift, shift), None)
    assert "forward" not in vars(block)


@pytest.mark.compile
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # The compiler's own, in this process.
def test_compiled_blocks_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler itself: `make test-compile`."""
    file = tmp_path / "denoiser.pt2"
    compile_denoiser(TASK, file)
    model = denoiser(depth=3)
    compiled = Inductor().load(CompileTask(json.dumps(TASK), KINDS), file, model)
    assert compiled.by_blocks
    wanted = {rows: model(**call(rows))[0] for rows in (2, 3, 5)}

    def eager(*_: Any) -> Any:
        raise AssertionError("a block ran eagerly")

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", eager)
    for rows, expected in wanted.items():
        assert compiled.takes(rows, exact=False)
        (found,) = compiled({**call(rows), "return_dict": False})
        assert (found - expected).norm() / expected.norm() < 1e-5
    with pytest.raises(AssertionError, match="ran eagerly"):
        model(**call(2))  # The control.
