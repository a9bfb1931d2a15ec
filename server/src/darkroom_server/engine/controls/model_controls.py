"""The ControlNets of one model, and what they add to a batch of its denoiser."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.core.inputs import InputImage
from darkroom_server.core.model import Guidance
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.controls.sample_control import SampleControl
from darkroom_server.engine.pipelines.arguments import Arguments, ArgumentSpec, Kind
from darkroom_server.engine.sample import Sample

Residuals = dict[str, list[torch.Tensor]]
"""By the denoiser's argument: a tensor for each of its blocks, or a single one."""


@dataclass(frozen=True, slots=True)
class Use:
    """A control of a sample in a batch, whose rows are those from ``start`` to ``end``.

    ``prompts`` replace the arguments of these rows.
    """

    control: SampleControl
    start: int
    end: int
    prompts: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelControls:
    """Runs the ControlNets of a batch's samples before the denoiser, each in a batch of its own.

    ``nets`` are in memory, by id. ``spec`` says what the denoiser's arguments are. ``images``
    encodes control images, if the kind of nets needs latents of them. ``guidance`` is the model's.
    Residuals exist only while one batch of the denoiser runs. Rows that have no control get zeros,
    which change nothing.
    """

    kind: ControlKind
    nets: Mapping[str, Any]
    denoiser: Any
    spec: ArgumentSpec
    precision: Callable[[], AbstractContextManager[Any]]
    images: ImageEncoder
    guidance: Guidance

    def of(self, sample: Sample) -> tuple[SampleControl, ...]:
        """The controls of a new sample. Raises as ``ImageEncoder.encode``."""
        generator = self.kind.noise(sample.generator)
        rows = self.guidance.rows_per_image(sample.job)
        return tuple(
            SampleControl(
                id=control.id,
                condition=self.condition(control.id, control.image, rows, generator),
                scale=control.scale,
                start=control.start,
                end=control.end,
            )
            for control in sample.job.controls
        )

    def condition(
        self, id: str, image: InputImage, rows: int, generator: torch.Generator
    ) -> torch.Tensor:
        """The input of the net ``id`` for ``rows`` rows, or a single one for all."""
        return self.kind.condition(image, rows, self.nets[id], self.images, generator)

    def add(self, given: Arguments, samples: Sequence[Sample]) -> Arguments:
        """The arguments ``given`` of a denoiser's call, with the residuals of its ``samples``.

        The rows of ``samples`` are in their order. ``given`` itself if no control applies now.
        """
        uses: dict[str, list[Use]] = {}
        row = 0
        for sample in samples:
            start, row = row, row + sample.rows
            calls = self.guidance.calls_per_step(sample.job)
            applied = sample.controls_at(sample.step, calls)
            if applied and calls > 1:
                self._keep_prompts(sample, calls, given, start, row)
            for control in applied:
                use = Use(control, start, row, sample.first_prompts)
                uses.setdefault(control.id, []).append(use)
        if not uses:
            return given
        totals: dict[Hashable, tuple[Any, Residuals]] = {}
        for id, users in uses.items():
            net = self.nets[id]
            _, total = totals.setdefault(self.kind.layout(net), (net, {}))
            for name, parts in self.residuals(id, given, users).items():
                into = total.setdefault(name, [_zeros(part, row) for part in parts])
                _add_scaled(into, parts, users)
        return {**given, **self.as_arguments(list(totals.values()))}

    def residuals(self, id: str, given: Arguments, users: Sequence[Use]) -> Residuals:
        """The residuals of the net ``id`` for the rows of ``users``, without scales."""
        net = self.nets[id]
        rows = [row for use in users for row in range(use.start, use.end)]
        arguments = self.spec.select(self.kind.arguments(given, net), rows)
        if any(use.prompts for use in users):
            arguments = {**arguments, **_first_prompts(arguments, users)}
        conditions = [
            use.control.condition.expand(use.end - use.start, *use.control.condition.shape[1:])
            for use in users
        ]
        with self.precision():
            outputs = net(
                **arguments,
                controlnet_cond=torch.cat(conditions),
                conditioning_scale=1.0,
                return_dict=False,
            )
        return {
            name: [output] if kind is Kind.ROWS else output
            for (name, kind), output in zip(self.kind.residuals.items(), outputs, strict=True)
            if output is not None
        }

    def as_arguments(self, totals: Sequence[tuple[Any, Residuals]]) -> dict[str, Any]:
        """The denoiser's arguments for residuals of several layouts, each with a net of it."""
        found: dict[str, list[Sequence[torch.Tensor]]] = {}
        for net, residuals in totals:
            for name, parts in residuals.items():
                spread = self.kind.spread(name, parts, net, self.denoiser)
                found.setdefault(name, []).append(spread)
        arguments: dict[str, Any] = {}
        for name, layouts in found.items():
            parts = [functools.reduce(torch.add, blocks) for blocks in zip(*layouts, strict=True)]
            arguments[name] = parts[0] if self.kind.residuals[name] is Kind.ROWS else parts
        return arguments

    def _keep_prompts(
        self, sample: Sample, calls: int, given: Arguments, start: int, end: int
    ) -> None:
        """Keep the prompts of the first call of a step for the others; theirs are negative."""
        if sample.step % calls == 0:
            sample.first_prompts = {name: given[name][start:end] for name in self.kind.prompts}


def controls_of(controls: ModelControls | None, sample: Sample) -> tuple[SampleControl, ...]:
    """As ``ModelControls.of``; none for a model without ``controls``."""
    return () if controls is None else controls.of(sample)


def controlled(
    controls: ModelControls | None, given: Arguments, samples: Sequence[Sample]
) -> Arguments:
    """As ``ModelControls.add``; ``given`` for a model without ``controls``."""
    return given if controls is None else controls.add(given, samples)


def _first_prompts(arguments: Arguments, users: Sequence[Use]) -> dict[str, torch.Tensor]:
    """The prompts in ``arguments``, the rows of ``users``, with those of their first calls."""
    counts = [use.end - use.start for use in users]
    names = {name for use in users for name in use.prompts}
    return {
        name: torch.cat(
            [
                use.prompts.get(name, rows)
                for use, rows in zip(users, arguments[name].split(counts), strict=True)
            ]
        )
        for name in names
    }


def _zeros(part: torch.Tensor, rows: int) -> torch.Tensor:
    """Zeros for ``rows`` rows, in the layout of ``part``: another one may change the last bits."""
    zeros = part.new_zeros((rows, *part.shape[1:]))
    if part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last):
        return zeros.contiguous(memory_format=torch.channels_last)
    return zeros


def _add_scaled(
    into: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], users: Sequence[Use]
) -> None:
    """Add ``parts``, the residuals of one net, to the rows of its ``users`` with their scales.

    The product is rounded before the sum, as diffusers does.
    """
    for total, part in zip(into, parts, strict=True):
        row = 0
        for use in users:
            rows = use.end - use.start
            total[use.start : use.end] += part[row : row + rows] * use.control.scale
            row += rows
