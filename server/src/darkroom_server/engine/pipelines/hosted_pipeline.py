"""A diffusers pipeline whose runs share its modules and are suspended at their calls."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.engine.pipelines.calls import DecodeCall, DenoiserCall, EncodeCall
from darkroom_server.engine.pipelines.coroutine import Coroutine, is_suspendable, suspend
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo, memo_key


class HostedPipeline:
    """One pipeline in memory, and as many runs of it as there are samples.

    A run has a shallow copy of the pipeline, with a scheduler of its own. It is suspended at each
    prompt that is not in ``memo``, at each call of the denoiser and at the VAE's decode. Calls
    from outside of a run go straight to the modules.
    """

    def __init__(
        self, pipeline: Any, denoiser_name: str, device: torch.device, memo: EncodeMemo
    ) -> None:
        self.memo = memo
        self.device = device
        self.denoiser = getattr(pipeline, denoiser_name)
        self._template = copy.copy(pipeline)
        self._template.__class__ = _hosted_class(type(pipeline), device, memo)
        _suspend_forward(self.denoiser, device.type)
        if getattr(pipeline, "vae", None) is not None:
            _suspend_decode(pipeline.vae, device.type)

    def run(
        self,
        scheduler: Any,
        arguments: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> Coroutine:
        """A run of the pipeline with ``arguments``, not yet started; its result is the pipeline's.

        ``own`` are further components that the run does not share.
        """
        pipeline = copy.copy(self._template)
        # Past diffusers' ``__setattr__``, which would change the configuration that is shared.
        pipeline.__dict__.update(own, scheduler=scheduler)
        return Coroutine(functools.partial(pipeline, **arguments), self.device.type)


@dataclass(slots=True)
class LastStep:
    """What a scheduler was given in its last step."""

    prediction: torch.Tensor
    timestep: Any
    latents: torch.Tensor


def hosted_scheduler(scheduler: Any) -> Any:
    """``scheduler`` with its timesteps on the CPU, where reading them does not wait for a GPU.

    If ``keeps_last_step`` is set on it, each step replaces ``last_step``. It is data and no
    callback, because nothing that a run reaches may lead to the run's sample.
    """
    hosted = copy.copy(scheduler)
    hosted.__class__ = _hosted_scheduler_class(scheduler.__class__)
    hosted.keeps_last_step = False
    hosted.last_step = None
    return hosted


@functools.cache
def _hosted_scheduler_class(base: Any) -> type:
    set_timesteps, step = base.set_timesteps, base.step

    # The wrappers keep the signatures: pipelines read them to see what a scheduler takes.
    @functools.wraps(set_timesteps)
    def set_timesteps_on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(self, *args, **kwargs)
        if "device" in bound.arguments:
            bound.arguments["device"] = "cpu"
        return set_timesteps(*bound.args, **bound.kwargs)

    @functools.wraps(step)
    def kept_step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.keeps_last_step:
            self.last_step = LastStep(model_output, timestep, sample)
        return step(self, model_output, timestep, sample, *args, **kwargs)

    members = {"set_timesteps": set_timesteps_on_cpu, "step": kept_step}
    return type(base.__name__, (base,), members)


class _NoProgress:
    def update(self, steps: int = 1) -> None:
        """Do nothing: progress is counted where the run is suspended."""


def _hosted_class(base: type, device: torch.device, memo: EncodeMemo) -> type:
    """The pipeline's class, without what takes time for each image or touches shared state."""

    @contextlib.contextmanager
    def progress_bar(self: Any, iterable: Any = None, total: Any = None) -> Iterator[_NoProgress]:
        yield _NoProgress()

    members: dict[str, Any] = {
        # diffusers looks for it in every module of every component.
        "_execution_device": device,
        "progress_bar": progress_bar,
        # It resets the hooks of the modules that are shared.
        "maybe_free_model_hooks": lambda self: None,
    }
    if hasattr(base, "encode_prompt"):
        members["encode_prompt"] = _remembered(base.encode_prompt, memo, device.type)
    return type(base.__name__, (base,), members)


def _remembered(encode: Any, memo: EncodeMemo, device_type: str) -> Any:
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        try:
            key = memo_key([[n, v] for n, v in sorted(given.items()) if n != "self"])
        except TypeError:
            # Given embeddings: there is nothing to encode.
            return encode(self, *args, **kwargs)
        if key not in memo:
            encoded = suspend(
                EncodeCall(functools.partial(encode, self, *args, **kwargs)), device_type
            )
            memo.keep(key, encoded)
            return encoded
        return memo.find(key)

    return encode_prompt


def _suspend_forward(module: Any, device_type: str) -> None:
    """Suspend each run that calls ``module``; what is called from elsewhere is computed at once."""
    compute = module.forward
    names = tuple(inspect.signature(compute).parameters)

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_suspendable():
            return compute(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False))
        arguments.update(kwargs)
        return suspend(DenoiserCall(arguments), device_type)

    module.forward = forward


def _suspend_decode(vae: Any, device_type: str) -> None:
    decode = vae.decode

    @functools.wraps(decode)
    def suspended_decode(z: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_suspendable():
            return decode(z, *args, **kwargs)
        return (suspend(DecodeCall(z), device_type),)

    vae.decode = suspended_decode
