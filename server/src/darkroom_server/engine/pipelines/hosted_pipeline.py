"""A diffusers pipeline whose runs share its modules and are suspended at their calls."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from darkroom_server.core.job import PromptSyntax
from darkroom_server.engine.adapters.weights import Mix
from darkroom_server.engine.pipelines.calls import (
    DecodeCall,
    DenoiserCall,
    EncodeCall,
    EncodeImageCall,
)
from darkroom_server.engine.pipelines.coroutine import Coroutine, is_suspendable, suspend
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo, memo_key


class HostedPipeline:
    """One pipeline in memory, and as many runs of it as there are samples.

    A run has a shallow copy of the pipeline, with a scheduler of its own. It is suspended at each
    prompt that is not in ``memo``, at each call of a denoiser, and if ``vae`` encodes or decodes.
    Calls from outside of a run go straight to the modules.

    ``denoisers`` are the names of the components that run every step. With ``isolated``, each run
    has its own, which share their weights: the pipeline may write to their other attributes.
    ``weighted_encoding`` takes the arguments of the pipeline's ``encode_prompt``, and returns what
    it returns, for prompts in the weighted syntax.
    """

    def __init__(
        self,
        pipeline: Any,
        denoisers: Sequence[str],
        vae: Any,
        device: torch.device,
        memo: EncodeMemo,
        *,
        isolated: bool = False,
        weighted_encoding: Callable[..., Any] | None = None,
    ) -> None:
        self.memo = memo
        self.device = device
        self._isolated = tuple(denoisers) if isolated else ()
        self._weighted_encoding = weighted_encoding
        self._vae = vae
        self._hosted_vae = None if vae is None else _hosted_vae(vae, device.type)
        self._template = self._hosted(pipeline)
        if not isolated:
            for name in denoisers:
                _suspend_forward(getattr(pipeline, name), device.type, as_tuples=True)

    def sharing(self, pipeline: Any) -> Self:
        """``pipeline``, which has the same modules, hosted with the same memo."""
        other = copy.copy(self)
        other._template = self._hosted(pipeline)
        return other

    def run(
        self,
        scheduler: Any,
        arguments: Mapping[str, Any],
        own: Mapping[str, Any],
        syntax: PromptSyntax = PromptSyntax.PLAIN,
        encoder_mix: Mix = (),
    ) -> Coroutine:
        """A run of the pipeline with ``arguments``, not yet started; its result is the pipeline's.

        ``own`` are further components that the run does not share. ``syntax`` is its prompts', and
        ``encoder_mix`` are the adapters with which they are encoded.
        """
        pipeline = copy.copy(self._template)
        # Past diffusers' ``__setattr__``, which would change the configuration that is shared.
        pipeline.__dict__.update(
            own, scheduler=scheduler, prompt_syntax=syntax, encoder_mix=encoder_mix
        )
        for name in self._isolated:
            module = sharing_copy(getattr(pipeline, name))
            _suspend_forward(module, self.device.type, as_tuples=False)
            pipeline.__dict__[name] = module
        return Coroutine(functools.partial(pipeline, **arguments), self.device.type)

    def _hosted(self, pipeline: Any) -> Any:
        hosted = copy.copy(pipeline)
        hosted.__class__ = _hosted_class(
            type(pipeline), self.device, self.memo, self._weighted_encoding
        )
        for name, part in vars(pipeline).items():
            if self._vae is not None and part is self._vae:
                hosted.__dict__[name] = self._hosted_vae
        if "safety_checker" in vars(hosted):
            # The engine checks the pixels itself, and fails the image.
            hosted.__dict__["safety_checker"] = None
        return hosted


def sharing_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy of ``module`` that shares its weights and buffers with it."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


class _NoProgress:
    def update(self, steps: int = 1) -> None:
        """Do nothing: progress is counted where the run is suspended."""


def _hosted_class(
    base: type,
    device: torch.device,
    memo: EncodeMemo,
    weighted_encoding: Callable[..., Any] | None,
) -> type:
    """The pipeline's class, without what takes time for each image or touches shared state."""

    @contextlib.contextmanager
    def progress_bar(self: Any, iterable: Any = None, total: Any = None) -> Iterator[_NoProgress]:
        yield _NoProgress()

    members: dict[str, Any] = {
        # diffusers looks for it in every module of every component.
        "_execution_device": device,
        "encoder_mix": (),
        "progress_bar": progress_bar,
        # It resets the hooks of the modules that are shared.
        "maybe_free_model_hooks": lambda self: None,
    }
    if hasattr(base, "encode_prompt"):
        members["encode_prompt"] = _remembered(
            base.encode_prompt, weighted_encoding, memo, device.type
        )
    return type(base.__name__, (base,), members)


def _remembered(
    encode: Any, encode_weighted: Callable[..., Any] | None, memo: EncodeMemo, device_type: str
) -> Any:
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        try:
            key = memo_key([self.prompt_syntax, self.encoder_mix, sorted(given.items())])
        except TypeError:
            # Given embeddings: there is nothing to encode.
            return encode(self, *args, **kwargs)
        if key not in memo:
            compute = functools.partial(encode, self, *args, **kwargs)
            if self.prompt_syntax is PromptSyntax.WEIGHTED:
                assert encode_weighted is not None, "the model does not take weighted prompts"
                compute = functools.partial(encode_weighted, **given)
            encoded = suspend(EncodeCall(compute), device_type)
            memo.keep(key, encoded)
            return encoded
        return memo.find(key)

    return encode_prompt


def _suspend_forward(module: Any, device_type: str, *, as_tuples: bool) -> None:
    """Suspend each run that calls ``module``; what is called from elsewhere is computed at once.

    ``as_tuples``: the denoiser is asked for a tuple, which can be split, even if the pipeline wants
    diffusers' output object; it gets one.
    """
    compute = module.forward
    names = tuple(inspect.signature(compute).parameters)
    makes_objects = as_tuples and "return_dict" in names

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_suspendable():
            return compute(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False))
        arguments.update(kwargs)
        if makes_objects and arguments.get("return_dict", True):
            arguments["return_dict"] = False
            output = suspend(DenoiserCall(module, arguments), device_type)
            return Transformer2DModelOutput(sample=output[0])
        return suspend(DenoiserCall(module, arguments), device_type)

    module.forward = forward


def _hosted_vae(vae: Any, device_type: str) -> Any:
    """``vae`` for runs: its modules and weights, but its encode and decode suspend the run."""
    hosted = copy.copy(vae)
    vae_class: Any = type(vae)
    hosted.__class__ = _hosted_vae_class(vae_class, device_type)
    return hosted


@functools.cache
def _hosted_vae_class(base: Any, device_type: str) -> type:
    names = tuple(inspect.signature(base.decode).parameters)[2:]
    encode_names = tuple(inspect.signature(base.encode).parameters)[2:] if _encodes(base) else ()

    @functools.wraps(base.decode)
    def decode(self: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_suspendable():
            return base.decode(self, z, *args, **kwargs)
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        return_dict = options.pop("return_dict", True)
        image = suspend(DecodeCall(z, options), device_type)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_suspendable():
            return base.encode(self, x, *args, **kwargs)
        options = {**dict(zip(encode_names, args, strict=False)), **kwargs}
        return suspend(EncodeImageCall(x, options), device_type)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Stay as it is: some pipelines convert the VAE, which all runs share, and back."""
        return self

    members: dict[str, Any] = {"decode": decode, "to": to}
    if _encodes(base):
        members["encode"] = functools.wraps(base.encode)(encode)
    return type(base.__name__, (base,), members)


def _encodes(vae_class: Any) -> bool:
    return hasattr(vae_class, "encode")
