"""A denoiser whose repeated blocks are compiled, while all else of it runs eagerly."""

import inspect
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from darkroom_server.engine.catalogue.slices import pause
from darkroom_server.engine.forms.compiled import CompiledDenoiser, open_package
from darkroom_server.engine.forms.signature import (
    Kinds,
    TensorKind,
    Values,
    laid_out,
    nested,
    read_kind,
)

MANIFEST = "blocks.json"
"""What the packages in a file of blocks are for."""


class CompiledBlock:
    """Takes the place of the ``forward`` of ``block``.

    ``package`` runs tensors of ``arguments``, the kinds of each argument's leaves by name, whose
    four-dimensional tensors have ``layout``. Calls with others run eagerly.
    """

    def __init__(
        self,
        block: Any,
        arguments: Mapping[str, Sequence[Mapping[str, Any]]],
        layout: torch.memory_format,
        package: Any,
    ) -> None:
        self.block = block
        self._eager = block.forward
        self._parameters = inspect.signature(block.forward)
        self._layout = layout
        self._run = package.run
        given, self._returned = map(pytree.treespec_loads, package.get_call_spec())
        _, self._given = given.children()
        self._names: list[str] = list(self._given.context)
        self._kinds = [read_kind(leaf) for name in self._names for leaf in arguments[name]]
        self._rows_in = next(
            (leaf, kind.shape.index(None))
            for leaf, kind in enumerate(self._kinds)
            if isinstance(kind, TensorKind) and None in kind.shape
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        tensors = self._arranged(args, kwargs)
        if tensors is None:
            return self._eager(*args, **kwargs)
        return pytree.tree_unflatten(self._run(tensors), self._returned)

    def _arranged(self, args: Any, kwargs: Any) -> list[torch.Tensor] | None:
        """The tensors as the package takes them, None if it does not."""
        given = self._parameters.bind(*args, **kwargs).arguments
        if given.keys() != set(self._names):
            return None
        leaves, structure = pytree.tree_flatten({name: given[name] for name in self._names})
        if structure != self._given:
            return None
        leaf, place = self._rows_in
        shape = getattr(leaves[leaf], "shape", ())
        if len(shape) <= place:
            return None
        tensors = []
        for kind, value in zip(self._kinds, leaves, strict=True):
            if not isinstance(kind, TensorKind):
                if isinstance(value, torch.Tensor) or value != kind:
                    return None
                continue
            tensor = laid_out(kind, value, shape[place], self._layout)
            if tensor is None:
                return None
            tensors.append(tensor)
        return tensors


def has_blocks(file: Path) -> bool:
    """Whether ``file`` has packages of blocks, not one of a whole denoiser."""
    with zipfile.ZipFile(file) as archive:
        return MANIFEST in archive.namelist()


def load_blocks(kinds: Kinds, file: Path, denoiser: Any) -> CompiledDenoiser:
    """The ``denoiser``, which takes calls of ``kinds``, with the compiled blocks of ``file``.

    It pauses before each block. Raises any error for a file that cannot be used.
    """
    blocks: list[CompiledBlock] = []
    with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as folder:
        manifest = json.loads(archive.read(MANIFEST))
        layout = torch.channels_last if manifest["channels_last"] else torch.contiguous_format
        for package in manifest["packages"]:
            unpacked = Path(archive.extract(package["file"], folder))
            for name in package["blocks"]:
                pause()
                block = denoiser.get_submodule(name)
                opened = open_package(unpacked, block)
                blocks.append(CompiledBlock(block, package["arguments"], layout, opened))

    def run(values: Values) -> Any:
        with replaced(blocks):
            return denoiser(**nested(kinds, values))

    return CompiledDenoiser(run, manifest["least_rows"], manifest["most_rows"], by_blocks=True)


@contextmanager
def replaced(blocks: Sequence[CompiledBlock]) -> Iterator[None]:
    """Run the blocks in their compiled form."""
    for each in blocks:
        each.block.forward = each
    try:
        yield
    finally:
        for each in blocks:
            del each.block.forward
