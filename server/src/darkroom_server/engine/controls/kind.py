"""What the ControlNets of a family are: how they are called, and what the denoiser gets."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from darkroom_server.core.inputs import InputImage
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.pipelines.arguments import Arguments, ArgumentSpec, Kind


class ControlKind(ABC):
    """The ControlNets of one class of denoisers.

    ``net_class`` is their class in diffusers. ``matched`` are entries of their configuration that
    must be equal to the denoiser's. ``residuals`` are the denoiser's arguments that a ControlNet
    returns, in its order, and the kind of each: ROWS or PER_BLOCK. ``spec`` is that of the
    denoiser. ``prompts`` are its arguments that differ between the calls of one step: a net gets
    those of the first call.
    """

    net_class: ClassVar[str]
    matched: ClassVar[tuple[str, ...]]
    residuals: ClassVar[Mapping[str, Kind]]
    spec: ClassVar[ArgumentSpec]
    prompts: ClassVar[tuple[str, ...]] = ()

    def mismatch(self, config: Mapping[str, Any], denoiser: Any) -> str:
        """Why a ControlNet of ``config`` does not fit ``denoiser``; empty if it does."""
        found = config.get("_class_name")
        if found != self.net_class:
            return f"it is a {found}, this kind of model takes a {self.net_class}"
        for name in self.matched:
            own, wanted = _plain(config.get(name)), _plain(denoiser.config.get(name))
            if own != wanted:
                return f"its {name} is {own}, the model's is {wanted}"
        return ""

    @abstractmethod
    def condition(
        self,
        image: InputImage,
        rows: int,
        net: Any,
        images: ImageEncoder,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The input of ``net`` for ``rows`` rows, or a single one for all, [rows or 1, ...].

        In its data type and on its device. ``generator`` is that of ``noise``.
        """

    @abstractmethod
    def arguments(self, given: Arguments, net: Any) -> dict[str, Any]:
        """The arguments of a call of ``net``, from those ``given`` to the denoiser.

        Without the condition, and what is the same in each call.
        """

    def layout(self, net: Any) -> Hashable:
        """Nets of equal layouts have residuals for the same blocks of the denoiser."""
        return None

    def spread(
        self, name: str, parts: Sequence[torch.Tensor], net: Any, denoiser: Any
    ) -> Sequence[torch.Tensor]:
        """The residuals ``parts`` of the argument ``name``, one for each block of ``denoiser``.

        ``net`` is one of their layout.
        """
        return parts

    def prepare(self, net: Any, denoiser: Any) -> None:  # noqa: B027 - few have to.
        """Give ``net``, which was loaded, what it shares with ``denoiser``."""

    def noise(self, generator: torch.Generator) -> torch.Generator:
        """The generator of the noise in the latents of control images; ``generator`` is a sample's.

        The sample's own one, as if its pipeline encoded them before anything else.
        """
        return generator


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
