"""What a family of models offers to the loader, the warm-up and the runner.

A family is one file in this folder with a ``Family`` and a ``Model``, and one line in ``registry``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import Failure, StartupError
from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import Guidance, ModelInfo, ModelLimits, SchedulerOffer
from darkroom_server.core.strength import StrengthRounding
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import NO_OPTIONS, Decoder
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.prompt_encoder import PromptKey
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.components.schedulers import config_of, offers
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.conditioning.task_pipelines import task_classes
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.controls.model_controls import ModelControls
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.warmup.formats import HalfPrecision, MemoryFormat

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a component of a model is called: autocast, or nothing."""

Embeddings = Mapping[PromptKey, Embedding]
"""Embeddings by what decides them."""


class Model(Protocol):
    """A model in memory, warmed up: what the runner calls.

    The methods raise whatever torch and diffusers raise; the runner splits and contains failures.
    They run on the loop's thread. ``attention`` is set up for each batch, None if nothing is
    sliced.
    """

    info: ModelInfo
    decoder: Decoder
    previewer: Previewer | None
    safety: SafetyChecker | None
    attention: SlicedAttention | None

    @property
    def forms(self) -> DenoiserForms | None:
        """The forms of its denoiser, None if that always runs eagerly."""

    @property
    def adapters(self) -> ModelAdapters | None:
        """The adapters of the rows of its batches, None if the server offers it none."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def batches_prompts(self) -> bool:
        """True if ``encode_prompts`` takes many jobs at once, False: one."""

    @property
    def encodes_slowly(self) -> bool:
        """True if batches must run between the prompts of two jobs, as an encode takes long."""

    @property
    def counts(self) -> tuple[Counts, ...]:
        """The counters of the model's components; the loop emits and clears them."""

    @property
    def prompt_cache_bytes(self) -> int:
        """The bytes of the embeddings in the prompt cache."""

    def clear_prompt_cache(self) -> None:
        """Forget the embeddings of all prompts."""

    def encode_prompts(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """For each job what ``new_samples`` takes: its prompts, encoded."""

    def new_samples(self, job: Job, encoded: Any) -> Sequence[Sample]:
        """A sample of pure noise for each of ``job.image_indices``."""

    def denoise(self, samples: Sequence[Any]) -> Sequence[Any]:
        """One denoiser call: for each sample what its ``advance`` takes.

        ``samples`` are this model's and of one ``Group``; each is at its own timestep.
        """

    def decode(self, sample: Any) -> NDArray[np.uint8] | Failure:
        """The pixels of a finished sample of this model: [height, width, 3], 0 to 255."""


class Family(ABC):
    """A kind of model: what its folder holds, and how a pipeline of it is placed and measured.

    Class attributes describe the family; an instance wraps one pipeline that is in memory.
    ``pipeline_class`` is the class in ``diffusers`` and in ``model_index.json``. ``components``
    have weights, all of which must be there but ``dispensable`` ones, which the index of a folder
    may leave out. ``optional`` are left out, or replaced by None.
    ``pipeline_options`` are further arguments of ``from_pretrained``. ``defaults`` are for
    requests that leave a field unset, see ``model_defaults``. ``denoiser_name`` is the component
    that runs every step.
    ``convolutional``: it has two-dimensional convolutions, which channels last can make faster.
    ``own_task`` is what ``pipeline_class`` does, ``tasks`` names the classes of diffusers that do
    further tasks with the same components. ``strength_rounding`` is that of their steps.
    ``most_reference_images``: of one edit, if the model has that task.
    ``half`` says how it runs in half precision.
    ``takes_loras``: the rows of its denoiser may have LoRA adapters. ``takes_ip_adapter``: an
    IP-Adapter can be loaded into its UNet. ``control_kind`` are the ControlNets that its rows may
    have, None for none.
    ``chosen_size`` is the default width and height that the operator set, in pixels. ``adapters``
    and ``controls`` are set before ``new_model``, None if the server offers none for this pipeline;
    so is ``forms``, None if the denoiser always runs eagerly.
    ``ip_adapter`` is set before ``prepare``, None without one.
    """

    pipeline_class: ClassVar[str]
    components: ClassVar[tuple[str, ...]]
    dispensable: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Defaults]
    denoiser_name: ClassVar[str]
    convolutional: ClassVar[bool]
    own_task: ClassVar[Task] = Task.TEXT_TO_IMAGE
    tasks: ClassVar[Mapping[Task, str]] = {}
    strength_rounding: ClassVar[StrengthRounding] = StrengthRounding.SKIPPED
    most_reference_images: ClassVar[int] = 1
    half: ClassVar[HalfPrecision] = HalfPrecision()
    takes_loras: ClassVar[bool] = True
    takes_ip_adapter: ClassVar[bool] = False
    control_kind: ClassVar[ControlKind | None] = None

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.chosen_size: int | None = None
        self.adapters: ModelAdapters | None = None
        self.ip_adapter: IpAdapter | None = None
        self.controls: ModelControls | None = None
        self.forms: DenoiserForms | None = None

    @classmethod
    @abstractmethod
    def check_folder(cls, folder: Path, name: str) -> None:
        """Check what diffusers does not: the parts of ``folder`` that are not weights.

        ``name`` is what the operator calls the model. Raises ``StartupError``.
        """

    @classmethod
    def weightless_parts(cls, folder: Path) -> dict[str, Any]:
        """The components of ``folder`` without weights that diffusers does not load itself."""
        return {}

    @abstractmethod
    def check_pipeline(self, name: str) -> None:
        """Raise ``StartupError`` if this pipeline needs what the family does not implement."""

    @property
    def model_defaults(self) -> Defaults:
        """The defaults of this pipeline, for requests that leave a field unset."""
        return self.defaults

    @property
    def denoiser(self) -> Any:
        """The module that runs every step."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> Any:
        """The module that decodes latents, None if the denoiser makes pixels."""
        return self.pipeline.vae

    @property
    def decode_options(self) -> Mapping[str, Any]:
        """Further arguments of the VAE's decode, for measurements."""
        return NO_OPTIONS

    @property
    def kept_bytes_per_row(self) -> int:
        """What a row keeps from one batch to the next, beside the sample itself."""
        return 0

    def prepare(  # noqa: B027 - not every family has something to prepare.
        self, memory_format: MemoryFormat, precision: Precision, config: EngineConfig
    ) -> None:
        """Get ready to be measured: the pipeline is on its device, in ``memory_format``."""

    @property
    def guidance(self) -> Guidance:
        """How the model applies classifier-free guidance."""
        return Guidance()

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that it takes if their extra is installed."""
        return frozenset({"negative_prompt", "guidance_scale", "preview"})

    @property
    def task_classes(self) -> dict[Task, Any]:
        """The class of diffusers that does each task which the model offers, its own first."""
        return {self.own_task: type(self.pipeline), **task_classes(self.tasks)}

    @property
    def image_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that its tasks and its IP-Adapter bring."""
        tasks = self.task_classes
        fields: set[str] = set()
        if {Task.IMAGE_TO_IMAGE, Task.INPAINT} & tasks.keys():
            fields |= {"image", "strength"}
        if Task.INPAINT in tasks:
            fields.add("mask_image")
        if Task.EDIT in tasks:
            fields.add("reference_images")
        if self.ip_adapter is not None:
            fields |= {"ip_adapter_image", "ip_adapter_scale"}
        return frozenset(fields)

    @property
    def unbatched_reason(self) -> str:
        """Why denoiser calls are not merged, empty if they are."""
        return ""

    @property
    def scheduler_offers(self) -> tuple[SchedulerOffer, ...]:
        """The schedulers that the model offers."""
        return offers(config_of(self.pipeline.scheduler))

    @property
    def bytes_per_sample(self) -> int:
        """What an unfinished image of the default size holds between its batches, in bytes."""
        return 0

    @property
    @abstractmethod
    def latent_factor(self) -> int:
        """Pixels of an image for one pixel of its latents, on each side."""

    @property
    @abstractmethod
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""

    @property
    def size(self) -> int:
        """The default width and height of an image, in pixels."""
        return self.chosen_size or self.latent_size * self.latent_factor

    @property
    def default_sequence_length(self) -> int | None:
        """The ``max_sequence_length`` of a request that sets none, None if it is not taken."""
        return None

    @abstractmethod
    def limits(self, max_rows: int) -> ModelLimits:
        """The bounds of a request, with the row limit that was measured."""

    @abstractmethod
    def denoiser_inputs(
        self, rows: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> dict[str, torch.Tensor]:
        """Keyword arguments of one denoiser call of ``rows`` images of the default size.

        The values are random, as those of real batches: zeros can be faster.
        """

    @abstractmethod
    def latents(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Latents of one image of the default size, for measurements of its decode."""

    def encode_prompt(self) -> bool:
        """Encode a prompt past the cache, for measurements; False if the family cannot."""
        return False

    def safety_checker(self, name: str) -> SafetyChecker:
        """The pipeline's own safety checker. Raises ``StartupError`` if it has none."""
        checker = getattr(self.pipeline, "safety_checker", None)
        feature_extractor = getattr(self.pipeline, "feature_extractor", None)
        if checker is None or feature_extractor is None:
            raise StartupError(f"model {name!r} has no safety checker: leave --safety-checker out")
        return SafetyChecker(checker, feature_extractor)

    @abstractmethod
    def new_model(
        self,
        info: ModelInfo,
        memory_format: MemoryFormat,
        device: torch.device,
        precision: Precision,
        decoder: Decoder,
        safety: SafetyChecker | None,
    ) -> Model:
        """The model to serve; its pipeline is on ``device``, in ``memory_format``, and measured."""
