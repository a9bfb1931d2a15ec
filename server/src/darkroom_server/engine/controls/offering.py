"""Which of the server's ControlNets fit a model, and their loading."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

from darkroom_server.core.adapters import AdapterKind, AdapterOffer
from darkroom_server.core.engine_config import Attention, ControlNetSource, EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.controls.measurement import measure_net
from darkroom_server.engine.controls.model_controls import ModelControls
from darkroom_server.engine.failures import is_out_of_memory, one_line
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.eight_bits import store_in_eight_bits
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.placement import vae_is_upcast
from darkroom_server.engine.warmup.presets import Runtime

COPIES = 2
"""The residuals of one net, and their sum with those of others, are in memory at once."""

USUAL_COST = 0.4
"""The cost of a ControlNet that was not measured: it is the half of a UNet that encodes."""


@dataclass(frozen=True, slots=True)
class OfferedControls:
    """The ControlNets of one model. ``bytes_per_row``: memory that they add to a row of a batch."""

    controls: ModelControls
    offers: tuple[AdapterOffer, ...]
    bytes_per_row: int


@dataclass(slots=True)
class ControlNets:
    """The ControlNets of a server, while its models are loaded.

    ``mismatches`` say why one does not fit a model, by id; ``fitting`` are the ids of the others.
    """

    config: EngineConfig
    fitting: set[str] = field(default_factory=set)
    mismatches: dict[str, list[str]] = field(default_factory=dict)

    def offer(
        self,
        model_id: str,
        family: Family,
        memory_format: MemoryFormat,
        runtime: Runtime,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> OfferedControls | None:
        """Load and measure those that fit the model of ``family``, which is ready to be measured.

        None if none fits. Raises ``StartupError`` for one that cannot be loaded, or that is for
        this model alone and does not fit it.
        """
        kind = family.control_kind
        nets = {
            source.id: _load(source, kind, family.denoiser, memory_format, runtime)
            for source in self.config.controlnets
            if source.model in (None, model_id)
            and self._fits(source, model_id, family)
            and kind is not None
        }
        if kind is None or not nets:
            return None
        layout = memory_format.layout if family.convolutional else torch.contiguous_format
        upcast = vae_is_upcast(family.pipeline)
        controls = ModelControls(
            kind=kind,
            nets=nets,
            denoiser=family.denoiser,
            spec=replace(kind.spec, layout=layout),
            precision=precision,
            images=ImageEncoder(family.vae, nullcontext if upcast else precision),
            guidance=family.guidance,
        )
        needs = {id: measure_net(id, controls, family, memory_format, runtime) for id in nets}
        offers = tuple(
            AdapterOffer(
                id=id,
                rank=0,
                bytes=sum(weight.numel() * weight.element_size() for weight in net.parameters()),
                kind=AdapterKind.CONTROLNET,
                cost=needs[id].cost,
            )
            for id, net in nets.items()
        )
        most = max(each.bytes_per_row for each in needs.values())
        return OfferedControls(controls, offers, COPIES * most)

    def described(self, model_id: str, family: Family) -> tuple[AdapterOffer, ...]:
        """Those that fit the model of ``family``, which is not loaded; nothing is measured.

        Raises ``StartupError`` for one that is for this model alone and does not fit it.
        """
        return tuple(
            AdapterOffer(
                id=source.id, rank=0, bytes=0, kind=AdapterKind.CONTROLNET, cost=USUAL_COST
            )
            for source in self.config.controlnets
            if source.model in (None, model_id) and self._fits(source, model_id, family)
        )

    def check(self) -> None:
        """Raise ``StartupError`` for a ControlNet that fits no model."""
        for source in self.config.controlnets:
            if source.id not in self.fitting:
                reasons = "; ".join(self.mismatches.get(source.id, ["none can be described"]))
                raise StartupError(f"ControlNet {source.location!r} fits no model ({reasons})")

    def _fits(self, source: ControlNetSource, model_id: str, family: Family) -> bool:
        kind = family.control_kind
        if kind is None:
            reason = "this kind of model takes no ControlNets"
        else:
            reason = kind.mismatch(_configuration(source, kind), family.denoiser)
        if reason and source.model is not None:
            raise StartupError(
                f"ControlNet {source.location!r} does not fit model {model_id!r}: {reason}"
            )
        if reason:
            self.mismatches.setdefault(source.id, []).append(f"{model_id}: {reason}")
            return False
        self.fitting.add(source.id)
        return True


def _configuration(source: ControlNetSource, kind: ControlKind) -> dict[str, Any]:
    """What ``config.json`` of a ControlNet says. Raises ``StartupError``."""
    try:
        found: dict[str, Any] = _class_of(kind).load_config(
            source.location, revision=source.revision, token=source.token
        )
    except Exception as error:  # diffusers and the hub raise errors of any type.
        raise _failed(source, error) from error
    return found


def _load(
    source: ControlNetSource,
    kind: ControlKind,
    denoiser: Any,
    memory_format: MemoryFormat,
    runtime: Runtime,
) -> Any:
    """A ControlNet on the model's device, in its format. Raises ``StartupError``."""
    try:
        net, report = _class_of(kind).from_pretrained(
            source.location,
            revision=source.revision,
            token=source.token,
            torch_dtype=memory_format.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _failed(source, error) from error
    # diffusers only warns of missing weights, and fills them with random values.
    if missing := sorted(report["missing_keys"]):
        raise StartupError(
            f"ControlNet {source.location!r} lacks {len(missing)} weights, such as {missing[0]}; "
            "copy or download it again"
        )
    net.requires_grad_(False).eval()
    if runtime.attention is Attention.SLICED and hasattr(net, "set_attention_slice"):
        size = runtime.slice_size
        net.set_attention_slice(int(size) if size.isdecimal() else size)
    if memory_format.channels_last:
        net.to(memory_format=torch.channels_last)
    if runtime.fp8_storage:
        store_in_eight_bits(net, memory_format.dtype)
    net.to(device=runtime.device)
    kind.prepare(net, denoiser)
    return net


def _class_of(kind: ControlKind) -> Any:
    return getattr(diffusers, kind.net_class)


def _failed(source: ControlNetSource, error: Exception) -> StartupError:
    return StartupError(
        f"ControlNet {source.location!r} cannot be loaded ({one_line(error)}); give a folder or a "
        "hub id with config.json and safetensors, as diffusers saves it"
    )
