"""The calls at which a pipeline's run is suspended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.engine.stepping.merged_step import LinearStep


@dataclass(slots=True)
class EncodeCall:
    """The pipeline encodes a prompt that is not in the memo; ``run`` does it."""

    run: Callable[[], Any]


@dataclass(slots=True)
class DenoiserCall:
    """The pipeline calls ``module``, its denoiser; resumed with the denoiser's output.

    ``arguments`` are by name, as they were given; those that were not are absent.
    """

    module: Any
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class StepCall:
    """The pipeline's scheduler takes ``step``; resumed with its result, as of ``take_steps``."""

    step: LinearStep


@dataclass(slots=True)
class DecodeCall:
    """The pipeline decodes ``latents`` with its VAE; resumed with the decoded tensor.

    ``options`` are the further arguments of the VAE's decode.
    """

    latents: torch.Tensor
    options: Mapping[str, Any]


@dataclass(slots=True)
class EncodeImageCall:
    """The pipeline encodes ``images`` with its VAE; resumed with what the VAE's encode returns.

    ``options`` are the further arguments of the VAE's encode.
    """

    images: torch.Tensor
    options: Mapping[str, Any]


Call = EncodeCall | EncodeImageCall | DenoiserCall | StepCall | DecodeCall
