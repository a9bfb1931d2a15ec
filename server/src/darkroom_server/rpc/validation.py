"""From ``GenerateRequest`` to ``Job``: every violation at once, and no field left to a default."""

import math
import secrets
import struct
from dataclasses import dataclass, field

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.core.job import SEED_BOUND, ImageFormat, Job, SchedulerName
from darkroom_server.core.model import ModelInfo
from darkroom_server.rpc.enums import FORMAT_FROM_WIRE, SCHEDULER_FROM_WIRE
from darkroom_server.rpc.reply_size import reply_size_error
from darkroom_server.rpc.request_id import REQUEST_ID, RULE, current_request_id
from darkroom_server.rpc.trace_context import current_trace


def request_id_of(request: generation_pb2.GenerateRequest) -> str:
    """The request's id; where it has none, or one that must not be used, that of the call."""
    if not REQUEST_ID.fullmatch(request.request_id):
        return current_request_id()
    return request.request_id


def as_float32(value: float) -> float:
    """What is left of ``value`` on the wire, where guidance is a 32-bit float.

    Defaults and bounds are rounded like what callers send: a replay then has the same guidance,
    and a bound of 7.3 admits a request for 7.3.
    """
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def job_of(
    request: generation_pb2.GenerateRequest,
    model: ModelInfo,
    *,
    job_id: str,
    submitted_at: float,
    deadline: float | None,
    caller: Caller = ANONYMOUS,
    preview: generation_pb2.PreviewOptions | None = None,
    max_reply_bytes: int | None = None,
) -> Job:
    """The job that ``request`` asks of ``model``; raises ``InvalidRequest``.

    ``submitted_at``, ``deadline``: ``time.monotonic`` seconds. ``max_reply_bytes``: what the caller
    can take in one message, None where the images are sent in pieces.
    """
    fields = _Fields(request, preview or generation_pb2.PreviewOptions(), model)
    fields.check_texts()
    scheduler = fields.scheduler()
    format = fields.format()
    trace = current_trace()
    job = Job(
        id=job_id,
        model=model.id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=fields.size("width", model.defaults.width),
        height=fields.size("height", model.defaults.height),
        steps=fields.steps(scheduler),
        guidance_scale=fields.guidance_scale(),
        seed=fields.seed(),
        image_count=fields.image_count(),
        scheduler=scheduler or model.defaults.scheduler,
        format=format or model.defaults.format,
        quality=fields.quality(format),
        exact=request.exact,
        submitted_at=submitted_at,
        deadline=deadline,
        priority=caller.priority,
        caller=caller.name,
        preview_every=fields.preview_every(),
        preview_format=fields.preview_format(),
        request_id=request_id_of(request),
        trace_id=trace.trace_id if trace else "",
    )
    if fields.violations:
        raise InvalidRequest(fields.violations)
    if max_reply_bytes is not None and (error := reply_size_error(job, max_reply_bytes)):
        raise error
    return job


@dataclass
class _Fields:
    """Reads one field after the other, and collects what is wrong with them."""

    request: generation_pb2.GenerateRequest
    preview: generation_pb2.PreviewOptions
    model: ModelInfo
    violations: list[Violation] = field(default_factory=list)

    def wrong(self, name: str, description: str) -> None:
        """Note that field ``name`` is not as ``description`` says."""
        self.violations.append(Violation(name, description))

    def check_texts(self) -> None:
        """Check the prompts, in bytes of UTF-8, and the request's id."""
        most = self.model.limits.max_prompt_bytes
        if not self.request.prompt:
            self.wrong("prompt", "must not be empty")
        for name in ("prompt", "negative_prompt"):
            size = len(getattr(self.request, name).encode())
            if size > most:
                self.wrong(name, f"must be at most {most} bytes of UTF-8, and has {size}")
        if self.request.request_id and not REQUEST_ID.fullmatch(self.request.request_id):
            self.wrong("request_id", RULE)

    def size(self, name: str, default: int) -> int:
        """Width or height, in pixels."""
        limits = self.model.limits
        value = self._number(name, default, limits.min_size, limits.max_size)
        if value % limits.size_multiple:
            self.wrong(name, f"must be a multiple of {limits.size_multiple}, not {value}")
        return value

    def scheduler(self) -> SchedulerName | None:
        """The scheduler, None where the request's is none that the model offers."""
        number = self.request.scheduler
        if not number:
            return self.model.defaults.scheduler
        name = SCHEDULER_FROM_WIRE.get(number)
        if name is None:
            self.wrong("scheduler", f"{number} is no scheduler that this server knows")
        elif self.model.offer(name) is None:
            offers = ", ".join(offer.name for offer in self.model.schedulers)
            self.wrong("scheduler", f"model {self.model.id!r} offers {offers}, not {name}")
        else:
            return name
        return None

    def steps(self, scheduler: SchedulerName | None) -> int:
        """Steps, within what the scheduler takes."""
        offers = [o for o in self.model.schedulers if scheduler in (None, o.name)]
        low = min(offer.min_steps for offer in offers)
        high = max(offer.max_steps for offer in offers)
        default = self.model.defaults.steps
        if not self.request.HasField("steps") and not low <= default <= high:
            self.wrong(
                "steps",
                f"must be set for {scheduler}, which takes {low} to {high}: the model's default "
                f"is {default}",
            )
            return default
        return self._number("steps", default, low, high)

    def guidance_scale(self) -> float:
        """Classifier-free guidance, 0 to the model's limit."""
        most = self.model.limits.max_guidance_scale
        value = self.request.guidance_scale
        if not self.request.HasField("guidance_scale"):
            return as_float32(self.model.defaults.guidance_scale)
        if not math.isfinite(value) or not 0.0 <= value <= as_float32(most):
            self.wrong("guidance_scale", f"must be 0 to {most:g}, not {value:g}")
        return value

    def seed(self) -> int:
        """The seed of the first image, drawn where the request has none."""
        if not self.request.HasField("seed"):
            return secrets.randbelow(SEED_BOUND)
        # The wire's type ends where the seeds do.
        if self.request.seed < 0:
            self.wrong("seed", f"must be 0 to {SEED_BOUND - 1}, not {self.request.seed}")
        return self.request.seed

    def image_count(self) -> int:
        """How many images."""
        return self._number("image_count", 1, 1, self.model.limits.max_image_count)

    def format(self) -> ImageFormat | None:
        """The format, None where the request's is unknown."""
        number = self.request.format
        if not number:
            return self.model.defaults.format
        name = FORMAT_FROM_WIRE.get(number)
        if name is None:
            self.wrong("format", f"{number} is no format that this server knows")
        return name

    def quality(self, format: ImageFormat | None) -> int:
        """The quality, for formats that have one."""
        if self.request.HasField("quality") and format and not format.takes_quality:
            self.wrong("quality", f"is for JPEG and WEBP only, not for {format.name}")
            return self.model.defaults.quality
        return self._number("quality", self.model.defaults.quality, 1, 100)

    def preview_every(self) -> int:
        """A preview each so many steps, 0 for none."""
        if self.preview.every_steps < 0:
            self.wrong("preview.every_steps", f"must be 0 or more, not {self.preview.every_steps}")
        return self.preview.every_steps

    def preview_format(self) -> ImageFormat:
        """The previews' format, a lossy one."""
        if not self.preview.format:
            return ImageFormat.JPEG
        name = FORMAT_FROM_WIRE.get(self.preview.format)
        if name is None or not name.takes_quality:
            self.wrong("preview.format", "must be JPEG or WEBP")
            return ImageFormat.JPEG
        return name

    def _number(self, name: str, default: int, low: int, high: int) -> int:
        if not self.request.HasField(name):  # type: ignore[arg-type]
            return default
        value: int = getattr(self.request, name)
        if not low <= value <= high:
            self.wrong(name, f"must be {low} to {high}, not {value}")
        return value
