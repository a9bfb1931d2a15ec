"""Plain data about how a loaded model runs, and how fast."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from darkroom_server.core.quantization import Quantization


class DenoiserForm(StrEnum):
    """The form in which a denoiser runs.

    EAGER: as diffusers wrote it. COMPILED: for this machine. GRAPHS: of its kernels, on a GPU.
    COMPILED_GRAPHS: of its kernels, and of compiled ones for the rows of most batches.
    """

    EAGER = "eager"
    COMPILED = "compiled"
    GRAPHS = "graphs"
    COMPILED_GRAPHS = "compiled graphs"

    @property
    def compiled(self) -> "DenoiserForm":
        """The form once the denoiser is compiled."""
        graphs = (DenoiserForm.GRAPHS, DenoiserForm.COMPILED_GRAPHS)
        return DenoiserForm.COMPILED_GRAPHS if self in graphs else DenoiserForm.COMPILED

    @property
    def is_compiled(self) -> bool:
        """Whether batches run a compiled denoiser."""
        return self is self.compiled


class RowLimitSource(StrEnum):
    """Where a model's row limit comes from.

    SET: configured as an exact number. MEASURED: at this start. REMEMBERED: measured at an earlier
    start. CORRECTED: measured or remembered, then changed by what real batches took.
    """

    SET = "set"
    MEASURED = "measured"
    REMEMBERED = "remembered"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRuntime:
    """How a model runs; ``slice_size`` is empty without sliced attention.

    ``channels_last`` is the layout of the denoiser, ``vae_channels_last`` that of the VAE.
    ``format_rule``: why the dtype and the layouts were chosen, empty if they were configured.
    ``preset_rule``: why ``preset`` is in force, and what of it does not suit the model; empty if
    it was configured and all of it suits. ``denoiser``: the form in which most of its batches run.
    ``machine``: the processor, and the versions of the libraries that compute on it.
    ``quantization``: how weights are stored in fewer bits, such as "int8" or "gguf:FILE", and
    ``offload``: what is copied to the device for each of its calls; both empty for nothing.
    """

    device: str
    dtype: str
    preset: str
    attention: str
    slice_size: str
    autocast: bool
    vae_tiling: bool
    channels_last: bool
    vae_channels_last: bool
    fp8_storage: bool
    safety_checker: bool
    format_rule: str = ""
    preset_rule: str = ""
    denoiser: DenoiserForm = DenoiserForm.EAGER
    quantization: str = ""
    offload: str = ""
    machine: str = ""

    @property
    def fingerprint(self) -> str:
        """Equal for runtimes that generate the same bytes for an ``exact`` request."""
        decisive: tuple[str | bool | None, ...] = (
            self.machine,
            self.device.partition(":")[0],
            self.dtype,
            self.memory_format,
            self.attention,
            self.autocast,
            self.vae_tiling,
            self.fp8_storage,
            self.quantization,
        )
        if self.other_vae_layout is not None:
            # Only then: older servers, which do not know the field, decode like the others.
            decisive += (self.other_vae_layout,)
        return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]

    @property
    def takes_exact(self) -> bool:
        """Whether equal bytes are promised for ``exact`` requests."""
        return Quantization.FP8_DYNAMIC not in self.quantization.split(", ")

    @property
    def memory_format(self) -> str:
        """The layout of the denoiser's weights, by torch's name."""
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def other_vae_layout(self) -> bool | None:
        """``vae_channels_last`` if it is not ``channels_last``: records have it only then."""
        return None if self.vae_channels_last == self.channels_last else self.vae_channels_last

    @property
    def log_fields(self) -> dict[str, str | bool]:
        """What the log says of it once the server serves."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "preset": self.preset,
            "attention": self.attention,
            "slice_size": self.slice_size,
            "autocast": self.autocast,
            "channels_last": self.channels_last,
            "vae_channels_last": self.vae_channels_last,
            "vae_tiling": self.vae_tiling,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """Speed measured at warm-up for the default size, in seconds; empty if not measured.

    ``passes`` are pairs of rows and the seconds of a batch, ``decode`` is for one image, ``encode``
    for one prompt that is not cached.
    """

    passes: tuple[tuple[int, float], ...] = ()
    decode: float = 0.0
    encode: float = 0.0
