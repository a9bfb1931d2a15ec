"""The steps of a noise scheduler as matrices of coefficients.

A step of diffusers' schedulers is linear: the next latents are a sum of the latents, of the
denoiser's prediction, of noise, and of the tensors that the scheduler keeps from earlier steps,
each times a number. The numbers depend on the scheduler's configuration, on the number of steps and
on the step, never on the image. So they are read once, off diffusers' own object, with unit vectors
in place of images.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from darkroom_server.engine.components.scheduler_table import SCHEDULERS

LINEAR_CLASSES = frozenset(spec.class_name for spec in SCHEDULERS.values())
"""The classes whose pipelines take nothing but the next latents from a step."""

PROBES = 2
TOLERANCE = 1e-4
"""Of the sum of a step's absolute terms: schedulers compute in float32, clipping changes more."""

NEGLIGIBLE = 1e-12
"""Smaller coefficients are the rounding of a zero."""

Path = tuple[str, int | None]
"""Where a scheduler keeps a tensor: an attribute, and a place in it if it is a list."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearSteps:
    """All steps of one run of a scheduler.

    ``matrices[i]`` of step i is [1 + kept, 1 + kept + 1 (+ 1)] in float32. Its columns are the
    latents, ``kept`` tensors from earlier steps (zeros before the first), the prediction, and the
    noise if any step takes some. Its rows are the next latents and the next kept tensors.
    ``timesteps[i]`` is what the denoiser gets, with the latents times ``scales[i]``. ``noisy[i]``
    says whether step i takes noise, which has ``noise_dtype``, None: that of the prediction.
    """

    matrices: tuple[torch.Tensor, ...]
    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    noisy: tuple[bool, ...]
    noise_dtype: torch.dtype | None
    kept: int

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def takes_noise(self) -> bool:
        """Whether any step takes noise."""
        return any(self.noisy)


@functools.lru_cache(maxsize=256)
def guided(steps: LinearSteps, scale: float) -> tuple[torch.Tensor, ...]:
    """The matrices of ``steps`` for classifier-free guidance by ``scale``.

    In place of the prediction they have two columns: the prediction for the negative prompt, and
    that for the prompt.
    """
    stacked = torch.stack(steps.matrices)
    before = 1 + steps.kept
    shares = torch.tensor([1.0 - scale, scale])
    pairs = stacked[:, :, before : before + 1] * shares
    parts = [stacked[:, :, :before], pairs, stacked[:, :, before + 1 :]]
    return torch.cat(parts, dim=2).unbind()


def read_steps(scheduler: Any, first: int = 0) -> LinearSteps | None:
    """The steps that ``scheduler`` takes, None if one of them is not linear.

    It has its timesteps; the run begins at the timestep of index ``first``. It is not changed. A
    scheduler that clips or thresholds is not linear.
    """
    if not _is_known(type(scheduler)):
        return None
    reader = _Reader(scheduler)
    timesteps = scheduler.timesteps[first:]
    steps = []
    for timestep in timesteps:
        step = reader.read(timestep)
        if step is None:
            return None
        steps.append(step)
    dtypes = {step.noise_dtype for step in steps if step.noisy}
    if len(dtypes) > 1:
        return None
    matrices, kept = _without_unused(steps)
    return LinearSteps(
        matrices=matrices,
        timesteps=tuple(timesteps.tolist()),
        scales=tuple(step.scale for step in steps),
        noisy=tuple(step.noisy for step in steps),
        noise_dtype=dtypes.pop() if dtypes else None,
        kept=kept,
    )


def _is_known(scheduler_class: type) -> bool:
    return any(base.__name__ in LINEAR_CLASSES for base in scheduler_class.__mro__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """``matrix`` as in ``LinearSteps``, in float64, with a column for noise in any case."""

    matrix: torch.Tensor
    scale: float
    noisy: bool
    noise_dtype: torch.dtype | None


class _Reader:
    """Takes the steps of a copy of ``scheduler`` with unit vectors.

    The tensors that the scheduler keeps are replaced before each step by further unit vectors.
    Each vector ends with random numbers, the same combination of which must come out of the step.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._kept: dict[Path, int] = {}
        self._random = torch.Generator().manual_seed(0)

    def read(self, timestep: Any) -> _Step | None:
        """The next step, None if it is not linear."""
        scheduler = self._scheduler
        kept = max(self._kept.values(), default=0)
        inputs = 1 + kept + 2
        numbers = torch.randn((inputs, PROBES), generator=self._random, dtype=torch.float64) * 100
        units = torch.cat([torch.eye(inputs, dtype=torch.float64), numbers], dim=1)
        vectors = [unit.reshape(1, 1, 1, -1) for unit in units]
        for (name, place), index in self._kept.items():
            if place is None:
                setattr(scheduler, name, vectors[index].clone())
            else:
                getattr(scheduler, name)[place] = vectors[index].clone()
        scale = 1.0
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(vectors[0].clone(), timestep)
            scale = float(scaled[0, 0, 0, 0])
            if not _is_sum(scaled, vectors[0] * scale):
                return None
        with _NoiseOf(vectors[-1]) as noise:
            stepped = scheduler.step(
                vectors[-2].clone(), timestep, vectors[0].clone(), return_dict=False
            )[0]
        if len(noise.dtypes) > 1:
            return None
        rows = [stepped.double().flatten()]
        self._kept = self._find_kept(rows, units.shape[1])
        found = torch.stack(rows)
        matrix, outputs = found[:, :inputs], found[:, inputs:]
        terms = matrix.abs() @ numbers.abs()
        if not ((outputs - matrix @ numbers).abs() <= TOLERANCE * terms).all():
            return None
        return _Step(
            matrix=torch.where(matrix.abs() < NEGLIGIBLE, 0.0, matrix),
            scale=scale,
            noisy=bool(noise.dtypes),
            noise_dtype=_asked(noise.dtypes),
        )

    def _find_kept(self, rows: list[torch.Tensor], length: int) -> dict[Path, int]:
        """The row of each tensor that the scheduler keeps; new ones are added to ``rows``."""
        found: dict[Path, int] = {}
        for path, tensor in _tensors_of(self._scheduler):
            if tensor.shape != (1, 1, 1, length):
                continue
            row = tensor.double().flatten()
            # Never the row of the next latents, which a pipeline may change before the next step.
            same = (i for i, other in enumerate(rows[1:], 1) if torch.equal(row, other))
            index = next(same, len(rows))
            if index == len(rows):
                rows.append(row)
            found[path] = index
        return found


class _NoiseOf(TorchFunctionMode):
    """Gives ``vector`` to whatever asks torch for noise; ``dtypes`` are those asked for."""

    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self._vector = vector

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        dtype = (kwargs or {}).get("dtype") or torch.get_default_dtype()
        self.dtypes.append(dtype)
        return self._vector.to(dtype)


def _asked(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """The dtype of the noise, None if it is that of the prediction, here float64."""
    return None if not dtypes or dtypes[0] == torch.float64 else dtypes[0]


def _is_sum(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((found - wanted).abs() <= TOLERANCE * wanted.abs()).all())


def _tensors_of(scheduler: Any) -> Iterable[tuple[Path, torch.Tensor]]:
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            yield (name, None), value
        elif isinstance(value, list):
            for place, each in enumerate(value):
                if isinstance(each, torch.Tensor):
                    yield (name, place), each


def _without_unused(steps: Sequence[_Step]) -> tuple[tuple[torch.Tensor, ...], int]:
    """The matrices without the kept tensors that no later step takes, and how many are left.

    All have the same shape, so that samples at different steps share a product.
    """
    used_rows = [0]
    kept_by_step: list[tuple[list[int], list[int]]] = []
    for step in reversed(steps):
        inputs = step.matrix.shape[1] - 2
        taken = step.matrix[used_rows, :inputs].abs().amax(dim=0) > 0
        columns = [0, *(i for i in range(1, inputs) if taken[i])]
        kept_by_step.append((used_rows, columns))
        used_rows = columns
    kept_by_step.reverse()
    kept = max(len(columns) for _, columns in kept_by_step) - 1
    noise = any(step.noisy for step in steps)
    matrices = torch.zeros(len(steps), 1 + kept, 1 + kept + 1 + noise)
    for matrix, step, (rows, columns) in zip(matrices, steps, kept_by_step, strict=True):
        chosen = step.matrix[rows].float()
        matrix[: len(rows), : len(columns)] = chosen[:, columns]
        matrix[: len(rows), 1 + kept] = chosen[:, -2]
        if noise:
            matrix[: len(rows), -1] = chosen[:, -1]
    return matrices.unbind(), kept
