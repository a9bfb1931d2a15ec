"""A sample whose pipeline runs in a coroutine."""

from collections.abc import Callable, Hashable
from typing import Any

import structlog
import torch

from darkroom_server.core.job import Job
from darkroom_server.engine.batch import Group, common_square
from darkroom_server.engine.pipelines.arguments import ArgumentSpec
from darkroom_server.engine.pipelines.calls import Call, DecodeCall, DenoiserCall, StepCall
from darkroom_server.engine.pipelines.coroutine import Coroutine, SwallowedEnd
from darkroom_server.engine.sample import Sample, predict_x0
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps

log = structlog.get_logger(__name__)


class UnexpectedCall(RuntimeError):
    """A pipeline went on in an order that cannot be served."""


class SuspendedSample(Sample):
    """One image: diffusers' own pipeline, suspended at ``pending``, or ended with ``result``.

    With ``spec`` None its denoiser calls are not merged with those of others. ``adapter_key`` must
    be equal for all rows of a batch.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        *,
        scheduler: Any,
        steps: int,
        spec: ArgumentSpec | None,
        vae_latents: Callable[[torch.Tensor, Job], torch.Tensor],
        prompt_truncated: bool,
        device: torch.device,
        adapter_key: Hashable = None,
    ) -> None:
        super().__init__(job, index, scheduler)
        self.pending: Call | None = None
        self.result: Any = None
        self._steps = steps
        self._spec = spec
        self._vae_latents = vae_latents
        self._prompt_truncated = prompt_truncated
        self._adapter_key = adapter_key
        self._coroutine: Coroutine | None = None
        self._group = Group(job.model, *job.denoised_size)
        self._rows = 1
        self._latents = torch.empty(0, device=device)

    def start(self, run: Coroutine) -> None:
        """Let ``run`` generate the image, up to its first call. Raises what it raises."""
        self._coroutine = run
        self._receive(run.start())

    def resume(self, value: Any) -> None:
        """Give the pending call its value, and go on to the next. Raises what the run raises."""
        assert self._coroutine is not None
        self.pending = None  # It holds tensors that the run may free now.
        self._receive(self._coroutine.resume(value))

    def begin_step(self, prediction: Any) -> LinearStep | None:
        """Go on to the scheduler's step, and return it if it can be merged, or to what follows."""
        self.scheduler.keeps_last_step = self.job.wants_preview(self.step + 1, self._steps)
        self.resume(prediction)
        if isinstance(self.pending, StepCall):
            return self.pending.step
        self._count_step()
        return None

    def finish_step(self, result: torch.Tensor) -> None:
        """Go on from the scheduler's step, which has this ``result``."""
        self.resume(result)
        while isinstance(self.pending, StepCall):
            # More steps than denoiser calls.
            self.resume(take_steps([self.pending.step])[0])
        self._count_step()

    @property
    def steps(self) -> int:
        """Denoiser calls from noise to image, as far as it is known."""
        return max(self._steps, self.step + (not self.done))

    @property
    def done(self) -> bool:
        """True once the latents are ready to be decoded."""
        return not isinstance(self.pending, DenoiserCall)

    @property
    def rows(self) -> int:
        """Rows of the pending denoiser call."""
        return self._rows

    @property
    def group(self) -> Group:
        """The group of samples whose pending calls can be merged with this one's."""
        return self._group

    @property
    def latents(self) -> torch.Tensor:
        """The latents that the VAE decodes; empty before."""
        return self._latents

    @property
    def prompt_truncated(self) -> bool:
        """True if the end of the prompt or of the negative prompt was cut off."""
        return self._prompt_truncated

    def held_bytes(self) -> int:
        """The bytes of the tensors that the suspended run holds, and of its controls."""
        held = self._coroutine.held_bytes() if self._coroutine else 0
        return held + super().held_bytes()

    def close(self) -> None:
        """End the run, if it has not ended, and free its tensors."""
        run, self._coroutine, self.pending = self._coroutine, None, None
        if run is None:
            return
        try:
            run.end()
        except SwallowedEnd:
            log.error("a pipeline swallowed its end", **self.job.log_fields)
        except Exception:
            log.exception("a pipeline failed while it ended", **self.job.log_fields)

    def _receive(self, found: Any) -> None:
        assert self._coroutine is not None
        if self._coroutine.ended:
            self.result, self._coroutine = found, None
            return
        self.pending = found
        if isinstance(found, DecodeCall):
            self._latents = found.latents
        elif isinstance(found, DenoiserCall):
            self._describe(found)

    def _count_step(self) -> None:
        self.step += 1
        self._predict_x0()
        if self.done and self.step != self._steps:
            log.warning("steps differ from the estimate", steps=self.step, estimate=self._steps)
            self._steps = self.step

    def _predict_x0(self) -> None:
        """Predict the final latents, if a preview is due and the scheduler took a step."""
        last, self.scheduler.last_step = self.scheduler.last_step, None
        if last is None or not isinstance(last.latents, torch.Tensor):
            return
        stepped = predict_x0(self.scheduler, last.prediction, last.timestep, last.latents)
        self.predicted_x0 = self._vae_latents(stepped, self.job)

    def _describe(self, call: DenoiserCall) -> None:
        job, spec = self.job, self._spec
        key: Hashable = None
        if spec is not None:
            self._rows = spec.rows(call.arguments)
            # A merged output can only be split if it is a tuple.
            if call.arguments.get("return_dict") is False:
                key = spec.group_key(call.arguments)
        known = key is not None
        key = (key, self._adapter_key) if known else (job.id, self.index)
        if key == self._group.key:
            return
        width, height = job.denoised_size
        if known and spec is not None and spec.mixes_sizes:
            width = height = common_square(width, height)
        self._group = Group(job.model, width, height, key=key)


def denoiser_call(sample: SuspendedSample) -> DenoiserCall:
    """The pending call of ``sample``. Raises ``UnexpectedCall`` if it is not one of a step."""
    if not isinstance(sample.pending, DenoiserCall):
        raise UnexpectedCall(f"a {type(sample.pending).__name__} in place of a step")
    return sample.pending
