"""Compiles the repeated blocks of a denoiser that cannot be compiled as a whole.

One package serves all blocks with equal code, weights of equal shapes and equal arguments. What is
between the blocks runs eagerly.
"""

import inspect
import json
import zipfile
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from darkroom_server.engine.forms.compiled_blocks import MANIFEST
from darkroom_server.engine.forms.exporting import example, exported, write_package
from darkroom_server.engine.forms.signature import (
    EXAMPLE_ROWS,
    FEWER_ROWS,
    Kinds,
    OtherArguments,
    TensorKind,
    described,
    kinds_of,
    nested,
)

MOST_PACKAGES = 16
"""Blocks of more kinds than that do not repeat."""

BlockKinds = dict[str, Any]
"""The arguments of a block by name, with a kind in place of each value."""


def repeated_blocks(denoiser: nn.Module) -> list[str]:
    """The names of the blocks that ``denoiser`` says it repeats; none is a part of another."""
    classes = getattr(denoiser, "_repeated_blocks", None) or ()
    found: list[str] = []
    for name, module in denoiser.named_modules():
        inside = found and name.startswith(f"{found[-1]}.")
        if type(module).__name__ in classes and not inside:
            found.append(name)
    return found


def compile_blocks(
    denoiser: nn.Module, kinds: Kinds, layout: torch.memory_format, file: Path
) -> None:
    """Write the packages of the blocks to ``file``; ``kinds`` are the arguments of ``denoiser``.

    Raises any error if a block cannot be compiled.
    """
    groups = grouped_blocks(denoiser, kinds, layout)
    manifest: dict[str, Any] = {"channels_last": layout is torch.channels_last, "packages": []}
    ranges, packages = [], []
    for number, (arguments, names) in enumerate(groups):
        package = file.with_name(f"{number}.pt2")
        program = exported(denoiser.get_submodule(names[0]), arguments, layout)
        ranges.append(write_package(program, package))
        packages.append(package)
        manifest["packages"].append(
            {"file": package.name, "blocks": names, "arguments": _as_data(arguments)}
        )
    manifest["least_rows"] = max(least for least, _ in ranges)
    manifest["most_rows"] = min(most for _, most in ranges)
    with zipfile.ZipFile(file, "w") as archive:
        for package in packages:
            archive.write(package, package.name)
        archive.writestr(MANIFEST, json.dumps(manifest))


def grouped_blocks(
    denoiser: nn.Module, kinds: Kinds, layout: torch.memory_format
) -> list[tuple[BlockKinds, list[str]]]:
    """The blocks that one package can serve, and their arguments.

    Raises ``OtherArguments`` for blocks that do not repeat, or whose arguments are not tensors with
    the rows in one dimension, and any error that the denoiser raises for tensors without values.
    """
    names = repeated_blocks(denoiser)
    fewer, more = (
        _calls(denoiser, names, nested(kinds, _examples(kinds, rows, layout)))
        for rows in (FEWER_ROWS, EXAMPLE_ROWS)
    )
    groups: dict[Hashable, tuple[BlockKinds, list[str]]] = {}
    for name in more:
        block, arguments = denoiser.get_submodule(name), _kinds(fewer[name], more[name])
        key = (_code_of(block), json.dumps(_as_data(arguments)))
        groups.setdefault(key, (arguments, []))[1].append(name)
    if not 0 < len(groups) <= MOST_PACKAGES:
        raise OtherArguments(f"it has blocks of {len(groups)} kinds")
    return list(groups.values())


def _examples(kinds: Kinds, rows: int, layout: torch.memory_format) -> dict[str, Any]:
    return {name: example(kind, rows, layout) for name, kind in kinds.items()}


def _calls(
    denoiser: nn.Module, names: Sequence[str], arguments: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The arguments with which ``denoiser`` calls its blocks, by the block's name.

    Nothing is computed: the tensors have no values.
    """
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    hooks = []
    for name in names:
        block = denoiser.get_submodule(name)
        signature = inspect.signature(block.forward)

        def note(
            _: Any, args: Any, kwargs: Any, name: str = name, signature: Any = signature
        ) -> None:
            found[name] = found[name] or dict(signature.bind(*args, **kwargs).arguments)

        hooks.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            denoiser(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kinds(fewer: Mapping[str, Any], more: Mapping[str, Any]) -> BlockKinds:
    """The kinds of a block's arguments, from those of ``FEWER_ROWS`` and ``EXAMPLE_ROWS`` rows."""
    few, structure = pytree.tree_flatten(dict(fewer))
    many, other = pytree.tree_flatten(dict(more))
    if structure != other:
        raise OtherArguments("the arguments of a block depend on the number of rows")
    names = list(map(str, range(len(many))))
    kinds = kinds_of(
        dict(zip(names, few, strict=True)),
        dict(zip(names, many, strict=True)),
    )
    tensors = [kind for kind in kinds.values() if isinstance(kind, TensorKind)]
    if not any(None in kind.shape for kind in tensors):
        raise OtherArguments("no argument of a block has the rows of a batch")
    found: BlockKinds = pytree.tree_unflatten([kinds.get(name) for name in names], structure)
    return found


def _as_data(arguments: BlockKinds) -> dict[str, list[dict[str, Any]]]:
    """What is in each argument, in the order of its leaves."""
    return {
        name: [described(kind) for kind in pytree.tree_leaves(argument)]
        for name, argument in arguments.items()
    }


def _code_of(block: nn.Module) -> Hashable:
    """Equal for blocks that compute the same with equal weights."""
    weights = (*block.named_parameters(), *block.named_buffers())
    settings = [
        (name, type(module), tuple(_plain_attributes(module)))
        for name, module in block.named_modules()
    ]
    return (
        tuple((name, weight.shape, weight.dtype) for name, weight in weights),
        tuple(settings),
    )


def _plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    )
