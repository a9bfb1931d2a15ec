"""Pipelines of diffusers that have no family of their own: served, but not batched.

Nothing about such a pipeline is known but what its class says and what a first run shows. Each call
of its denoiser runs as the pipeline makes it, so no two images share a batch; several take turns.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import structlog
import torch
import transformers
from PIL import Image

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import Failure, StartupError
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.core.model import Guidance, ModelLimits, SchedulerOffer
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.schedulers import config_of, name_of, offer
from darkroom_server.engine.failures import is_fatal, is_out_of_memory, one_line
from darkroom_server.engine.families.base import Precision
from darkroom_server.engine.families.half_dtypes import UNDESCRIBED
from darkroom_server.engine.families.suspended import PROBE_PROMPT, SuspendedFamily
from darkroom_server.engine.pipelines.calls import DecodeCall, DenoiserCall, EncodeCall
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import UnexpectedCall
from darkroom_server.engine.warmup.formats import MemoryFormat

log = structlog.get_logger(__name__)

SIZE_MULTIPLE = 64
"""Sizes are multiples of it: no pipeline of diffusers asks for a larger one."""

FEWER_STEPS, MORE_STEPS = 2, 4
"""The steps of the two runs that count a pipeline's denoiser calls."""


class Undescribed(SuspendedFamily):
    """The family of a pipeline that nobody has described; ``undescribed_family`` makes subclasses.

    ``denoisers`` are the components that run the steps, and ``vae_name`` is the one that decodes.
    """

    convolutional = False
    takes_loras = False
    has_previews = False
    half = UNDESCRIBED
    denoisers: ClassVar[tuple[str, ...]]
    vae_name: ClassVar[str | None]

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._parameters = call_parameters(type(pipeline))
        self._name = type(pipeline).__name__
        self._first: _Run | None = None
        self._offer: SchedulerOffer
        self._size = 0
        self._takes_sizes = {"width", "height"} <= self._parameters.keys()

    def check_pipeline(self, name: str) -> None:
        """Raise ``StartupError`` if the scheduler samples noise that no seed repeats."""
        super().check_pipeline(name)
        self._name = name

    @property
    def denoiser(self) -> Any:
        """The module that ran the first step, once there was one."""
        return self._first.call.module if self._first else super().denoiser

    @property
    def vae(self) -> Any:
        """The module that decodes latents, None if the denoiser makes pixels."""
        return getattr(self.pipeline, self.vae_name) if self.vae_name else None

    @property
    def decode_options(self) -> Mapping[str, Any]:
        """Further arguments of the VAE's decode, for measurements."""
        assert self._first is not None
        assert self._first.decode is not None
        return self._first.decode.options

    @property
    def unbatched_reason(self) -> str:
        """Why denoiser calls are not merged."""
        return (
            f"{self.pipeline_class} is not described: it is not known which calls of its denoiser "
            "can be merged"
        )

    @property
    def guidance(self) -> Guidance:
        """Whatever it costs is part of the calls that were counted."""
        return Guidance(scale=None)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the pipeline takes, as far as it shows."""
        named = {
            "prompt_2",
            "prompt_3",
            "negative_prompt",
            "negative_prompt_2",
            "negative_prompt_3",
        }
        fields = named & self._parameters.keys()
        if "negative_prompt" in fields and self._parameters["negative_prompt"].default is None:
            fields.add("empty_negative_prompt")
        fields |= {
            name
            for name in ("guidance_scale", "guidance_rescale")
            if default_number(self._parameters, name, None) is not None
        }
        return frozenset(fields)

    @property
    def scheduler_offers(self) -> tuple[SchedulerOffer, ...]:
        """The model's own scheduler, under both of its names."""
        return tuple(replace(self._offer, name=name) for name in self._runs.schedulers)

    @property
    def size(self) -> int:
        """The default width and height of an image, in pixels."""
        return self.chosen_size or self._size

    @property
    def latent_factor(self) -> int:
        """Pixels of an image for one pixel of its latents, on each side; 8 if it does not say."""
        return int(getattr(self.pipeline, "vae_scale_factor", 8))

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the default size."""
        size = self._size or default_number(self._parameters, "height", 0) or 8 * self.latent_factor
        return int(size) // self.latent_factor

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, as far as the pipeline says; else 0."""
        tokenizer = self._tokenizer
        most = tokenizer.model_max_length if tokenizer else 0
        # transformers' value for a tokenizer that does not say it is 1e30.
        known = int(most) if most < 1e6 else 0
        limit = int(default_number(self._parameters, "max_sequence_length", 0))
        return min(known, limit) or max(known, limit)

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the default size, or that alone if the pipeline did not make another."""
        multiple = self._size_multiple
        return ModelLimits(
            min_size=max(multiple, self.size // 2 // multiple * multiple),
            max_size=self.size * 2 if self._takes_sizes else self.size,
            size_multiple=multiple,
            prompt_tokens=self.prompt_tokens,
            max_rows=max_rows,
        )

    def prepare(
        self, memory_format: MemoryFormat, precision: Precision, config: EngineConfig
    ) -> None:
        """Run the pipeline twice, to see what it generates and how many calls that takes.

        Raises ``StartupError`` if it cannot be served.
        """
        log.warning("denoiser calls are not batched", why=self.unbatched_reason)
        device = self.denoiser.device
        scheduler = hosted_scheduler(self.pipeline.scheduler, timesteps_on_cpu=False)
        self._runs = Runs(
            # Without a memo: what else an encode changes, and who writes to its result, is unknown.
            hosts={
                self.own_task: HostedPipeline(
                    self.pipeline,
                    self.denoisers,
                    self.vae,
                    device,
                    EncodeMemo(0, device),
                    isolated=True,
                )
            },
            spec=None,
            arguments_of=self.call_arguments,
            vae_latents=self.vae_latents,
            schedulers=dict.fromkeys((SchedulerName.MODEL, name_of(scheduler)), scheduler),
            own={name: getattr(self.pipeline, name) for name in self.own_components},
            precision=precision,
        )
        self._probe_pipeline()

    def denoiser_inputs(
        self, rows: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> dict[str, Any]:
        """The arguments of a run's first denoiser call, whatever ``rows`` is."""
        assert self._first is not None
        return dict(self._first.call.arguments)

    def latents(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Latents of one image of the default size, as the VAE takes them."""
        assert self._first is not None
        assert self._first.decode is not None
        return self._first.decode.latents

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``: those that it names and ``job`` sets.

        What the model does not take, and what ``job`` leaves open, is left to the pipeline.
        """
        values = {name: getattr(job, name) for name in self.optional_fields}
        asked = {name: value for name, value in values.items() if value != ""}
        if asked.pop("empty_negative_prompt", False):
            asked.setdefault("negative_prompt", "")
        size = {"width": job.width, "height": job.height} if self._takes_sizes else {}
        return self._known({**asked, **size, **_call(job.prompt, job.steps)})

    def is_truncated(self, job: Job) -> bool:
        """Whether the tokenizer cuts a prompt of ``job``; False if nothing says where."""
        tokenizer, limit = self._tokenizer, self.prompt_tokens
        if tokenizer is None or not limit:
            return False
        texts = [text for text in (job.prompt, job.negative_prompt) if text]
        return any(len(ids) > limit for ids in tokenizer(texts, verbose=False).input_ids)

    @property
    def _tokenizer(self) -> Any:
        found = getattr(self.pipeline, self.prompt_tokenizer, None)
        return found if isinstance(found, transformers.PreTrainedTokenizerBase) else None

    @property
    def _size_multiple(self) -> int:
        if not self._takes_sizes and self.size:
            return self.size
        return math.gcd(SIZE_MULTIPLE, self.size)

    def _known(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name in self._parameters}

    def _probe_pipeline(self) -> None:
        try:
            random_state = torch.get_rng_state()
            chosen = dict.fromkeys(("width", "height"), self.chosen_size)
            first = self._generate(FEWER_STEPS, chosen if self.chosen_size else {})
            if not torch.equal(random_state, torch.get_rng_state()):
                raise UnexpectedCall("it samples noise that no seed repeats")
            width, height = first.image_size
            self._size = max(width, height)
            more = self._generate_another_size()
            if more is None:
                self._takes_sizes = False
                more = self._generate(MORE_STEPS, {})
            if width != height and not self._takes_sizes:
                raise UnexpectedCall(f"its images have {width}×{height} pixels, and are not square")
        except Exception as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            log.debug("model failed to generate", exc_info=True)
            raise StartupError(
                f"model {self._name!r}: its {self.pipeline_class} cannot generate an image from a "
                f"prompt alone ({one_line(error)})"
            ) from error
        per_step = round((more.calls - first.calls) / (MORE_STEPS - FEWER_STEPS))
        self._offer = replace(
            offer(SchedulerName.MODEL, config_of(self.pipeline.scheduler)),
            calls_per_step=per_step,
            extra_calls=first.calls - per_step * FEWER_STEPS,
        )
        self._first = first
        self._bytes_per_sample = first.held_bytes
        log.info(
            "denoiser calls counted",
            calls_per_step=per_step,
            extra_calls=self._offer.extra_calls,
            default_size=self.size,
            other_sizes=self._takes_sizes,
        )

    def _generate_another_size(self) -> "_Run | None":
        """A run of another size, None if the pipeline does not make one."""
        if not self._takes_sizes:
            return None
        multiple = self._size_multiple
        smallest = max(multiple, self.size // 2 // multiple * multiple)
        wanted = (smallest, smallest + multiple)
        try:
            found = self._generate(MORE_STEPS, {"width": wanted[0], "height": wanted[1]})
        except Exception as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            log.info("the pipeline takes one size only", why=one_line(error))
            return None
        if found.image_size == wanted:
            return found
        log.info("the pipeline takes one size only", asked=wanted, got=found.image_size)
        return None

    def _generate(self, steps: int, size: Mapping[str, int | None]) -> "_Run":
        """Run the pipeline alone, to the end. Raises what it raises, and ``UnexpectedCall``."""
        runs = self._runs
        arguments = {
            **self._known(_call(PROBE_PROMPT, steps)),
            **size,
            "generator": torch.Generator("cpu").manual_seed(0),
        }
        run = runs.host.run(
            copy.deepcopy(runs.schedulers[SchedulerName.MODEL]),
            arguments,
            {name: copy.deepcopy(part) for name, part in runs.own.items()},
        )
        first: DenoiserCall | None = None
        decode: DecodeCall | None = None
        calls = held_bytes = 0
        try:
            pending = run.start()
            while not run.ended:
                match pending:
                    case EncodeCall() if first is None:
                        with runs.precision():
                            pending = run.resume(pending.run())
                    case DenoiserCall() if decode is None:
                        first = first or pending
                        held_bytes = max(held_bytes, run.held_bytes())
                        calls += 1
                        pending = run.resume(runs.call_denoiser(pending.module, pending.arguments))
                    case DecodeCall() if first is not None:
                        decode = pending
                        pending = run.resume(self._decoded(pending))
                    case _:
                        raise UnexpectedCall(f"a {type(pending).__name__} out of order")
        finally:
            run.end()
        if first is None:
            raise UnexpectedCall(f"it does not call its {', '.join(self.denoisers)}")
        if self.vae is not None and decode is None:
            raise UnexpectedCall(f"it does not decode with its {self.vae_name}")
        return _Run(first, calls, held_bytes, decode, _image_of(pending).size)

    def _decoded(self, call: DecodeCall) -> torch.Tensor:
        found = Decoder(self.vae, self._vae_precision).decode_scaled(call.latents, call.options)
        if isinstance(found, Failure):
            raise UnexpectedCall(found.message)
        return found

    def _vae_precision(self) -> AbstractContextManager[Any]:
        in_float32 = next(self.vae.parameters()).dtype == torch.float32
        return nullcontext() if in_float32 else self._runs.precision()


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run of a pipeline showed; ``held_bytes`` are the most at a denoiser call."""

    call: DenoiserCall
    calls: int
    held_bytes: int
    decode: DecodeCall | None
    image_size: tuple[int, int]


def _call(prompt: str, steps: int) -> dict[str, Any]:
    # All pipelines make PIL images, and not all make tensors.
    return {
        "prompt": prompt,
        "num_inference_steps": steps,
        "output_type": "pil",
        "return_dict": False,
    }


def _image_of(result: Any) -> Image.Image:
    """The image of a pipeline's result. Raises ``UnexpectedCall`` if it is not just one."""
    images = result[0]
    if isinstance(images, list) and len(images) == 1 and isinstance(images[0], Image.Image):
        return images[0]
    raise UnexpectedCall("it does not return one image")


def call_parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    return inspect.signature(pipeline_class.__call__).parameters


def default_number(parameters: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """The default of a parameter if it is a number, else ``otherwise``."""
    default = parameters[name].default if name in parameters else None
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    return default if is_number else otherwise
