"""Plain data about a loaded model: defaults, limits, schedulers, runtime, memory, speed."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.job import ImageFormat, Job, SchedulerName, Task
from darkroom_server.core.model_runtime import ModelRuntime, ModelSpeed, RowLimitSource
from darkroom_server.core.strength import StrengthRounding

OPTIONAL_FIELDS = (
    "negative_prompt",
    "empty_negative_prompt",
    "guidance_scale",
    "guidance_rescale",
    "true_cfg_scale",
    "max_sequence_length",
    "prompt_2",
    "prompt_3",
    "negative_prompt_2",
    "negative_prompt_3",
    "prompt_syntax",
    "preview",
    "image",
    "mask_image",
    "strength",
    "reference_images",
    "loras",
    "controls",
    "ip_adapter_image",
    "ip_adapter_scale",
)
"""Fields of a request that not every model takes; a request that sets another one is rejected."""

CONDITION_BYTES_PER_PIXEL = 12
"""What the image of a ControlNet takes in memory, at most: three channels in float32."""

EXTRAS = {"prompt_syntax": "prompt-weights"}
"""The extra of ``darkroom-server`` that an optional field needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a model applies classifier-free guidance, and what it costs.

    An image is guided if the job's field ``scale`` is more than ``above``, and, if
    ``needs_negative``, only with a negative prompt. A guided image takes ``rows`` rows in each of
    ``calls`` denoiser calls for each step of the scheduler; another takes one row in one call.
    With ``scale`` None no image is guided.
    """

    scale: Literal["guidance_scale", "true_cfg_scale"] | None = "guidance_scale"
    above: float = 1.0
    needs_negative: bool = False
    rows: int = 2
    calls: int = 1

    def applies_to(self, job: Job) -> bool:
        """Whether the images of ``job`` are guided."""
        if self.scale is None or (self.needs_negative and not job.has_negative_prompt):
            return False
        scale: float = getattr(job, self.scale)
        return scale > self.above

    def rows_per_image(self, job: Job) -> int:
        """Rows of one image of ``job`` in a denoiser call."""
        return self.rows if self.applies_to(job) else 1

    def calls_per_step(self, job: Job) -> int:
        """Denoiser calls of one image of ``job`` for each step of its scheduler."""
        return self.calls if self.applies_to(job) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """What an unset field of a request means. Sizes in pixels.

    ``max_sequence_length`` is None if the model does not take it, and so are ``strength``, for
    image to image, and ``inpaint_strength``.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: SchedulerName
    format: ImageFormat = ImageFormat.PNG
    quality: int = 90
    true_cfg_scale: float = 1.0
    max_sequence_length: int | None = None
    strength: float | None = None
    inpaint_strength: float | None = None

    def strength_of(self, task: Task) -> float:
        """The strength of a job of ``task``; 1 if the model does not take it."""
        own = self.inpaint_strength if task is Task.INPAINT else self.strength
        return 1.0 if own is None else own


_UNSET = {
    field.name: field.default
    for field in fields(Job)
    if field.name in OPTIONAL_FIELDS and field.name not in ModelDefaults.__slots__
}
"""The optional fields whose default is the same for every model, and that default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """The bounds of a request to a model, all inclusive. Sizes in pixels.

    ``max_rows`` is the row limit of a batch now; ``row_limit_source`` says where it comes from.
    ``max_sequence_length`` bounds the request's field, 0 if the model does not take it; so with
    the numbers of reference images, LoRAs and ControlNets. ``min_reference_side``: no side of a
    reference image is shorter. ``sizes`` are the only pairs of width and height that the model
    makes; any, if empty.
    """

    min_size: int
    max_size: int
    size_multiple: int
    prompt_tokens: int
    max_rows: int
    row_limit_source: RowLimitSource = RowLimitSource.SET
    max_guidance_scale: float = 50.0
    max_image_count: int = 16
    max_prompt_bytes: int = 8192
    max_sequence_length: int = 0
    max_reference_images: int = 0
    min_reference_side: int = 1
    max_loras: int = 0
    max_controls: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOffer:
    """A scheduler that a model offers, and the steps it takes (inclusive).

    ``calls_per_step`` and ``extra_calls`` are the denoiser calls that its steps need.
    """

    name: SchedulerName
    min_steps: int
    max_steps: int
    calls_per_step: int = 1
    extra_calls: int = 0

    def denoiser_calls(self, steps: int) -> int:
        """Denoiser calls that one image of ``steps`` steps takes."""
        return self.calls_per_step * steps + self.extra_calls


def heads_of_slice(heads: int, scale: float) -> int:
    """The heads in a slice of attention whose image has ``scale`` times the default's pixels.

    The scores of a head grow with the square of the pixels; at the default size a slice has
    ``heads``.
    """
    return max(1, int(heads / max(1.0, scale) ** 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """Memory of batches and decodes besides the weights, measured at warm-up, in bytes.

    ``bytes_per_row`` and ``bytes_per_decode`` are for an image of ``pixels`` and grow in proportion
    to its pixels. A decode by tiles of ``tile_pixels`` needs no more than one tile.
    ``bytes_per_pass`` is needed once for all rows, and grows with the square of the pixels: the
    scores of sliced attention. ``available_bytes`` was free on the device, less a safety margin.
    ``bytes_per_sample`` is what an unfinished image of one row holds between its batches; it grows
    at most in proportion to its pixels and rows. ``control_bytes_per_row`` is what ControlNets add
    to ``bytes_per_row``.

    ``heads_per_slice``: a slice of attention has this number of heads at ``pixels``, and fewer at
    larger sizes; 0: the same number at each size. ``sdpa_bytes_per_row``: a row's bytes with SDPA
    in place of slices, 0 if the runtime has no such choice.
    """

    pixels: int
    bytes_per_row: int
    bytes_per_decode: int
    available_bytes: int
    bytes_per_pass: int = 0
    tile_pixels: int | None = None
    bytes_per_sample: int = 0
    control_bytes_per_row: int = 0
    heads_per_slice: int = 0
    sdpa_bytes_per_row: int = 0

    def uses_sdpa(self, width: int, height: int) -> bool:
        """Whether batches of this size run with SDPA: no slice is fine enough for two rows."""
        sliced = self._two_sliced_rows(width, height)
        return self.sdpa_saves(width, height) and sliced > self.available_bytes

    def sdpa_saves(self, width: int, height: int) -> bool:
        """Whether two rows of this size need less memory with SDPA than with slices."""
        sdpa = 2 * self.sdpa_bytes_per_row * width * height / self.pixels
        return 0 < sdpa < self._two_sliced_rows(width, height)

    def _two_sliced_rows(self, width: int, height: int) -> float:
        scale = width * height / self.pixels
        return 2 * self.bytes_per_row * scale + self._slice_bytes(scale)

    def _per_row_and_once(self, scale: float, *, uses_sdpa: bool) -> tuple[float, float]:
        """The bytes of each row of a batch without ControlNets, and those that it needs once."""
        if uses_sdpa:
            return self.sdpa_bytes_per_row * scale, 0.0
        return self.bytes_per_row * scale, self._slice_bytes(scale)

    def _slice_bytes(self, scale: float) -> float:
        grown = self.bytes_per_pass * scale**2
        if not self.heads_per_slice:
            return grown
        return grown * heads_of_slice(self.heads_per_slice, scale) / self.heads_per_slice

    def needed(
        self,
        width: int,
        height: int,
        rows: int,
        *,
        reference_pixels: int = 0,
        controlled: bool = False,
    ) -> int:
        """The peak of one image of ``rows`` rows: its batch or its decode, whichever needs more.

        ``reference_pixels`` are those of a job, which are not decoded. ``controlled``: with
        ControlNets.
        """
        scale = (width * height + reference_pixels) / self.pixels
        sdpa = self.uses_sdpa(width, height)
        per_row, once = self._per_row_and_once(scale, uses_sdpa=sdpa)
        passes = rows * (per_row + controlled * self.control_bytes_per_row * scale) + once
        scale = width * height / self.pixels
        if self.tile_pixels is not None:
            scale = min(1.0, width * height / self.tile_pixels)
        return round(max(passes, self.bytes_per_decode * scale))

    def rows_that_fit(self, width: int, height: int, held: int | None = None) -> int:
        """Rows of one batch at this size, at least 2; admission rejects images that never fit.

        Unfinished images hold ``held`` bytes now; with None, those of the batch itself are counted.
        """
        scale = width * height / self.pixels
        # Half of the peak of two rows for each row: with more rows than were measured, the peak may
        # be in another layer, where more memory grows with the rows.
        sdpa = self.uses_sdpa(width, height)
        each, once = self._per_row_and_once(scale, uses_sdpa=sdpa)
        per_row = each + self.control_bytes_per_row * scale + once / 2
        if held is None:
            per_row += self.bytes_per_sample * max(1.0, scale)
        return max(2, int((self.available_bytes - (held or 0)) / max(1.0, per_row)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that is loaded and warmed up.

    Unless ``limits.row_limit_source`` is SET, real batches may raise ``limits.max_rows`` up to
    ``most_rows``. ``optional_fields`` are those of ``OPTIONAL_FIELDS`` that the model takes,
    ``fields_without_extra`` those that it would take if their extra in ``EXTRAS`` were installed.
    ``unbatched_reason``: why its denoiser calls are not merged into batches, empty if they are.
    ``tasks``: what it can do. ``adapters`` are those that fit it. ``measured_references``: the
    reference images in what was measured.
    """

    id: str
    revision: str
    kind: str
    defaults: ModelDefaults
    limits: ModelLimits
    schedulers: tuple[SchedulerOffer, ...]
    runtime: ModelRuntime
    memory: MemoryNeeds
    speed: ModelSpeed = ModelSpeed()  # noqa: RUF009 - it is frozen.
    most_rows: int = 0
    guidance: Guidance = Guidance()
    optional_fields: frozenset[str] = frozenset({"negative_prompt", "guidance_scale", "preview"})
    fields_without_extra: frozenset[str] = frozenset()
    unbatched_reason: str = ""
    tasks: tuple[Task, ...] = (Task.TEXT_TO_IMAGE,)
    strength_rounding: StrengthRounding = StrengthRounding.TAKEN
    adapters: tuple[AdapterOffer, ...] = ()
    measured_references: int = 0

    def reference_pixels(self, images: int) -> int:
        """``Job.reference_pixels`` of ``images`` reference images.

        Each counts as an image of the default size: pipelines scale to about that.
        """
        return max(0, images - self.measured_references) * self.memory.pixels

    @property
    def preset_rule(self) -> str:
        """Why the preset is in force, and what of it does not suit the model or the memory."""
        limits, memory = self.limits, self.memory
        sides = range(limits.min_size, limits.max_size + 1, max(1, limits.size_multiple))
        first = next((side for side in sides if memory.uses_sdpa(side, side)), None)
        if first is None:
            return self.runtime.preset_rule
        why = f"attention is sdpa from {first}×{first} on: no slice is fine enough for the memory"
        return "; ".join(filter(None, (self.runtime.preset_rule, why)))

    def options_of(self, job: Job) -> dict[str, Any]:
        """The optional fields that a request needs to generate the images of ``job`` again.

        By name, without ``negative_prompt`` and ``preview``. A field whose default is the model's
        own is among them with any value: another revision may have another default.
        """
        return {
            name: value
            for name in OPTIONAL_FIELDS
            if name in self.optional_fields
            and name not in ("negative_prompt", "preview")
            and (name != "strength" or job.image is not None)
            and (value := getattr(job, name)) != _UNSET.get(name)
        }

    def with_row_limit(self, max_rows: int) -> Self:
        """This model after real batches have corrected its row limit."""
        limits = replace(self.limits, max_rows=max_rows, row_limit_source=RowLimitSource.CORRECTED)
        return replace(self, limits=limits)

    def with_bytes_per_sample(self, bytes_per_sample: int) -> Self:
        """This model after a real image held more than was measured."""
        return replace(self, memory=replace(self.memory, bytes_per_sample=bytes_per_sample))

    def with_runtime(self, **changes: Any) -> Self:
        """This model after ``changes`` of the fields of its runtime."""
        return replace(self, runtime=replace(self.runtime, **changes))

    def samples_per_image(self, job: Job) -> float:
        """What an image of ``job`` holds, in multiples of ``memory.bytes_per_sample``."""
        pixels = job.width * job.height + job.reference_pixels
        scale = max(1.0, pixels / self.memory.pixels)
        prompts = self.guidance.rows * self.guidance.calls if self.guidance.applies_to(job) else 1
        return prompts * scale

    def held_bytes(self, job: Job) -> int:
        """Bytes that one unfinished image of ``job`` holds between its batches, at most."""
        controls = len(job.controls) * CONDITION_BYTES_PER_PIXEL * job.width * job.height
        return controls + math.ceil(self.memory.bytes_per_sample * self.samples_per_image(job))

    def needed_bytes(self, job: Job) -> int:
        """Bytes that ``job`` needs alone: what its images hold, and a batch of one of them."""
        batch = self.needed_by_rows(job, self.rows_per_image(job))
        return batch + job.image_count * self.held_bytes(job)

    def needed_by_rows(self, job: Job, rows: int) -> int:
        """Bytes that a batch of ``rows`` rows of ``job`` needs, or the decode of an image of it."""
        return self.memory.needed(
            job.width,
            job.height,
            rows,
            reference_pixels=job.reference_pixels,
            controlled=bool(job.controls),
        )

    def rows_of_a_pass(self, width: int, height: int) -> int:
        """Rows that a batch of this size may have; at least 2."""
        return min(self.limits.max_rows, self.memory.rows_that_fit(width, height))

    def offer(self, name: SchedulerName) -> SchedulerOffer | None:
        """The offer of scheduler ``name``, None if this model does not have it."""
        return next((offer for offer in self.schedulers if offer.name == name), None)

    def rows_per_image(self, job: Job) -> int:
        """Rows of one image of ``job`` in a batch."""
        return self.guidance.rows_per_image(job)

    def denoiser_calls(self, job: Job) -> int:
        """Denoiser calls that one image of ``job`` takes; 0 if its strength leaves no step.

        Raises ``ValueError`` if the model does not offer the job's scheduler.
        """
        offer = self.offer(job.scheduler)
        if offer is None:
            raise ValueError(f"model {self.id!r} does not offer scheduler {job.scheduler!r}")
        taken = self.steps_taken(job)
        if taken < 1:
            return 0
        # The first steps are skipped, and those are never the ones that take another number.
        skipped_calls = (job.steps - taken) * offer.calls_per_step
        calls = offer.denoiser_calls(job.steps) - skipped_calls
        return self.guidance.calls_per_step(job) * calls

    def control_cost(self, job: Job) -> float:
        """What the ControlNets of ``job`` add to its batches, as a part of the denoiser's time."""
        costs = {offer.id: offer.cost for offer in self.adapters}
        applied = [control for control in job.controls if control.scale]
        return sum(costs.get(each.id, 0.0) * (each.end - each.start) for each in applied)

    def steps_taken(self, job: Job) -> int:
        """The steps that one image of ``job`` takes: fewer than asked if it starts from another."""
        if job.image is None:
            return job.steps
        return self.strength_rounding.steps_taken(job.steps, job.strength)
