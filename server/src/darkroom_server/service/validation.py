"""From a ``GenerationRequest`` to a ``Job``: all violations at once, and no field left unset."""

import math
import secrets
import struct
from dataclasses import dataclass, field, replace

from darkroom_server.core.errors import InvalidRequest, Reason, Violation
from darkroom_server.core.job import (
    PROMPT_FIELDS,
    SEED_BOUND,
    ImageFormat,
    Job,
    PromptSyntax,
    SchedulerName,
    Task,
)
from darkroom_server.core.model import EXTRAS, OPTIONAL_FIELDS, ModelInfo
from darkroom_server.core.prompt_syntax import PromptSyntaxError, PromptTooLong, check_length
from darkroom_server.core.quantization import Quantization
from darkroom_server.core.record import prompts_fit_in_jpeg
from darkroom_server.service.call_context import REQUEST_ID, RULE, CallContext
from darkroom_server.service.input_fields import check_inputs, input_values
from darkroom_server.service.request import INPUT_FIELDS, GenerationRequest

SCHEDULERS = {name.value: name for name in SchedulerName}
FORMATS = {format.value: format for format in ImageFormat}
SYNTAXES = {syntax.value: syntax for syntax in PromptSyntax}

MAX_REPLY_BYTES = 64 * 1024**2
"""Whatever the caller accepts: a whole reply stays in memory until it is read."""

OVERHEAD_BYTES = 64 * 1024
"""More than an image's format and replay record ever take besides its pixels."""


def as_float32(value: float) -> float:
    """``value`` rounded to 32 bits, as a scale is on the wire.

    Defaults and bounds are rounded like what callers send: a replay has the same guidance, and a
    bound of 7.3 accepts a request for 7.3.
    """
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def job_of(
    request: GenerationRequest,
    model: ModelInfo,
    call: CallContext,
    *,
    job_id: str,
    submitted_at: float,
    deadline: float | None,
) -> Job:
    """The job that ``request`` asks of ``model``, without its images; raises ``InvalidRequest``.

    ``submitted_at`` and ``deadline`` are in ``time.monotonic`` seconds.
    """
    fields = _Fields(request, model)
    fields.check_texts()
    fields.check_optional_fields()
    scheduler = fields.scheduler()
    format = fields.format()
    job = Job(
        id=job_id,
        model=model.id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=fields.size("width", request.width, model.defaults.width),
        height=fields.size("height", request.height, model.defaults.height),
        steps=fields.steps(scheduler),
        guidance_scale=fields.scale("guidance_scale", model.defaults.guidance_scale),
        seed=fields.seed(),
        image_count=fields.image_count(),
        scheduler=scheduler or model.defaults.scheduler,
        format=format or model.defaults.format,
        quality=fields.quality(format),
        exact=fields.exact(),
        embed_record=fields.embed_record(format),
        submitted_at=submitted_at,
        deadline=deadline,
        priority=call.caller.priority,
        caller=call.caller.name,
        preview_every=fields.preview_every(),
        preview_format=fields.preview_format(),
        request_id=job_id,
        trace_id=call.trace.trace_id if call.trace else "",
        prompt_2=request.prompt_2,
        prompt_3=request.prompt_3,
        negative_prompt_2=request.negative_prompt_2,
        negative_prompt_3=request.negative_prompt_3,
        empty_negative_prompt=request.empty_negative_prompt,
        true_cfg_scale=fields.scale("true_cfg_scale", model.defaults.true_cfg_scale),
        guidance_rescale=fields.guidance_rescale(),
        max_sequence_length=fields.max_sequence_length(),
        prompt_syntax=fields.prompt_syntax(),
    )
    if request.inputs is not None:
        job = replace(job, **input_values(request.inputs, model))
    if request.inputs is not None or Task.TEXT_TO_IMAGE not in model.tasks:
        fields.violations += check_inputs(request.inputs, model, job.steps)
    fields.check_size(job.width, job.height)
    if fields.violations:
        raise InvalidRequest(fields.violations)
    return job


def reply_bytes(job: Job) -> int:
    """The most bytes of the reply to ``job``: no format makes an image larger than its pixels."""
    return job.image_count * (job.width * job.height * 3 + OVERHEAD_BYTES)


@dataclass(frozen=True, slots=True)
class ReplyLimit:
    """What the caller accepts in one message; ``advice`` says how to raise it over its door."""

    max_bytes: int
    advice: str

    def check(self, job: Job) -> None:
        """Raise ``InvalidRequest`` if the reply to ``job`` may be larger."""
        limit = min(self.max_bytes, MAX_REPLY_BYTES)
        size = reply_bytes(job)
        if size <= limit:
            return
        if limit == MAX_REPLY_BYTES:
            why = f"no reply has more than {limit}; ask for fewer or smaller images, or a stream"
        else:
            why = f"the caller takes {limit}; ask for fewer or smaller images, or {self.advice}"
        description = (
            f"{job.image_count} of {job.width}×{job.height} pixels may make a reply of {size} "
            f"bytes, and {why}"
        )
        raise InvalidRequest([Violation("image_count", description)], Reason.REPLY_TOO_LARGE)


@dataclass
class _Fields:
    """Reads the fields one by one and collects their violations."""

    request: GenerationRequest
    model: ModelInfo
    violations: list[Violation] = field(default_factory=list)

    def wrong(self, name: str, description: str) -> None:
        """Record that field ``name`` violates ``description``."""
        self.violations.append(Violation(name, description))

    def check_texts(self) -> None:
        """Check the prompts, in bytes of UTF-8, and the request id."""
        most = self.model.limits.max_prompt_bytes
        request = self.request
        if not request.prompt:
            self.wrong("prompt", "must not be empty")
        for name in PROMPT_FIELDS:
            size = len(getattr(request, name).encode())
            if size > most and self._takes(name):
                self.wrong(name, f"must be at most {most} bytes of UTF-8, and has {size}")
        if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
            self.wrong("request_id", RULE)

    def check_optional_fields(self) -> None:
        """Which fields the model takes, and which go together."""
        request = self.request
        for name in OPTIONAL_FIELDS:
            if not self._takes(name) and self._is_set(name):
                self.wrong(
                    "preview.every_steps" if name == "preview" else name, self._why_not(name)
                )
        if (
            request.empty_negative_prompt
            and request.negative_prompt
            and self._takes("empty_negative_prompt")
        ):
            self.wrong("empty_negative_prompt", "must not be set with a negative_prompt")

    def _takes(self, name: str) -> bool:
        return name not in OPTIONAL_FIELDS or name in self.model.optional_fields

    def _why_not(self, name: str) -> str:
        """Why the model does not take the optional field ``name``."""
        model = self.model
        if name in model.fields_without_extra:
            return (
                f"model {model.id!r} takes it only if the server has the extra {EXTRAS[name]}: "
                f"pip install 'darkroom-server[{EXTRAS[name]}]'"
            )
        takes = [each for each in OPTIONAL_FIELDS if each in model.optional_fields]
        return (
            f"model {model.id!r} does not take it; "
            f"it takes {', '.join(takes) or 'no optional field'}"
        )

    def _is_set(self, name: str) -> bool:
        request = self.request
        match name:
            case "preview":
                return request.preview_every > 0
            case "prompt_syntax":
                return request.prompt_syntax == PromptSyntax.WEIGHTED
        holder = request.inputs if name in INPUT_FIELDS else request
        value = getattr(holder, name, None)
        return value is not None and value is not False and value != "" and value != ()

    def size(self, name: str, value: int | None, default: int) -> int:
        """Width or height, in pixels."""
        limits = self.model.limits
        size = self._number(name, value, default, limits.min_size, limits.max_size)
        if size % limits.size_multiple:
            self.wrong(name, f"must be a multiple of {limits.size_multiple}, not {size}")
        return size

    def check_size(self, width: int, height: int) -> None:
        """Check a width and a height together, if the model makes certain sizes only."""
        sizes = self.model.limits.sizes
        if not sizes or (width, height) in sizes:
            return
        if any(violation.field in ("width", "height") for violation in self.violations):
            return
        nearest = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
        self.wrong(
            "width",
            f"model {self.model.id!r} makes certain sizes only, not {width}×{height}; the one of "
            f"the nearest shape is {nearest[0]}×{nearest[1]}",
        )

    def scheduler(self) -> SchedulerName | None:
        """The scheduler, None if the model does not offer the request's."""
        asked = self.request.scheduler
        if asked is None:
            return self.model.defaults.scheduler
        name = SCHEDULERS.get(asked)
        if name is None:
            self.wrong("scheduler", f"{asked} is not a scheduler that this server knows")
            return None
        if self.model.offer(name) is None:
            offers = ", ".join(offer.name for offer in self.model.schedulers)
            self.wrong("scheduler", f"model {self.model.id!r} offers {offers}, not {name}")
            return None
        return name

    def steps(self, scheduler: SchedulerName | None) -> int:
        """Steps, within the scheduler's range."""
        offers = [o for o in self.model.schedulers if scheduler in (None, o.name)]
        low = min(offer.min_steps for offer in offers)
        high = max(offer.max_steps for offer in offers)
        default = self.model.defaults.steps
        if self.request.steps is None and not low <= default <= high:
            self.wrong(
                "steps",
                f"must be set for {scheduler}, which takes {low} to {high}: the model's default "
                f"is {default}",
            )
            return default
        return self._number("steps", self.request.steps, default, low, high)

    def scale(self, name: str, default: float) -> float:
        """A scale of classifier-free guidance, 0 to the model's limit."""
        return self._real(name, default, self.model.limits.max_guidance_scale)

    def guidance_rescale(self) -> float:
        """How far guidance is rescaled, 0 to 1."""
        return self._real("guidance_rescale", 0.0, 1.0)

    def max_sequence_length(self) -> int | None:
        """Tokens of the prompt, None if neither the request nor the model sets them."""
        value, name = self.request.max_sequence_length, "max_sequence_length"
        if value is None or not self._takes(name):
            return self.model.defaults.max_sequence_length
        return self._number(name, value, value, 1, self.model.limits.max_sequence_length)

    def prompt_syntax(self) -> PromptSyntax:
        """How the prompts are read; each must be valid in that syntax, and not too long."""
        asked = self.request.prompt_syntax
        if asked is None:
            return PromptSyntax.PLAIN
        syntax = SYNTAXES.get(asked)
        if syntax is None:
            self.wrong("prompt_syntax", f"{asked} is not a prompt syntax that this server knows")
            return PromptSyntax.PLAIN
        if syntax is PromptSyntax.WEIGHTED and self._takes("prompt_syntax"):
            self._check_weighted_prompts()
        return syntax

    def _check_weighted_prompts(self) -> None:
        window = self.model.limits.prompt_tokens
        for name in PROMPT_FIELDS:
            try:
                check_length(getattr(self.request, name), window)
            except (PromptSyntaxError, PromptTooLong) as error:
                self.wrong(name, str(error))

    def seed(self) -> int:
        """The seed of the first image, random if the request has none."""
        seed = self.request.seed
        if seed is None:
            return secrets.randbelow(SEED_BOUND)
        if not 0 <= seed < SEED_BOUND:
            self.wrong("seed", f"must be 0 to {SEED_BOUND - 1}, not {seed}")
        return seed

    def image_count(self) -> int:
        """The number of images."""
        most = self.model.limits.max_image_count
        return self._number("image_count", self.request.image_count, 1, 1, most)

    def format(self) -> ImageFormat | None:
        """The format, None if the request's is unknown."""
        asked = self.request.format
        if asked is None:
            return self.model.defaults.format
        format = FORMATS.get(asked)
        if format is None:
            self.wrong("format", f"{asked} is not a format that this server knows")
        return format

    def quality(self, format: ImageFormat | None) -> int:
        """The quality, for formats that have one."""
        asked, default = self.request.quality, self.model.defaults.quality
        if asked is not None and format and not format.takes_quality:
            self.wrong("quality", f"is for JPEG and WEBP only, not for {format.name}")
            return default
        return self._number("quality", asked, default, 1, 100)

    def exact(self) -> bool:
        """Whether the bytes must not depend on the server's load, if the model can promise that."""
        if self.request.exact and not self.model.runtime.takes_exact:
            self.wrong(
                "exact",
                f"model {self.model.id!r} multiplies in 8-bit floats with scales of each call "
                f"(--quantize {Quantization.FP8_DYNAMIC}), for which equal bytes are not promised; "
                "leave it unset",
            )
        return self.request.exact

    def embed_record(self, format: ImageFormat | None) -> bool:
        """Whether each image's file has its record, for formats that can hold it."""
        request = self.request
        if request.embed_record and format:
            if not format.takes_record:
                self.wrong("embed_record", f"is for PNG, JPEG and WEBP, not for {format.name}")
            elif format is ImageFormat.JPEG and not prompts_fit_in_jpeg(
                getattr(request, name) for name in PROMPT_FIELDS
            ):
                self.wrong("embed_record", "the prompts are too long for a JPEG's XMP; ask for PNG")
        return request.embed_record

    def preview_every(self) -> int:
        """A preview every N steps, 0 for none."""
        every = self.request.preview_every
        if every < 0:
            self.wrong("preview.every_steps", f"must be 0 or more, not {every}")
        return every

    def preview_format(self) -> ImageFormat:
        """The format of previews, a lossy one."""
        asked = self.request.preview_format
        if asked is None:
            return ImageFormat.JPEG
        format = FORMATS.get(asked)
        if format is None or not format.takes_quality:
            self.wrong("preview.format", "must be JPEG or WEBP")
            return ImageFormat.JPEG
        return format

    def _real(self, name: str, default: float, most: float) -> float:
        value: float | None = getattr(self.request, name)
        if value is None or not self._takes(name):
            return as_float32(default)
        if not math.isfinite(value) or not 0.0 <= value <= as_float32(most):
            self.wrong(name, f"must be 0 to {most:g}, not {value:g}")
        return value

    def _number(self, name: str, value: int | None, default: int, low: int, high: int) -> int:
        if value is None:
            return default
        if not low <= value <= high:
            self.wrong(name, f"must be {low} to {high}, not {value}")
        return value
