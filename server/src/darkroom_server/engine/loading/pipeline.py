"""From a folder, a single file or a hub id to a diffusers pipeline in memory."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import structlog
import torch
import transformers

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.components.classes import component_class
from darkroom_server.engine.failures import is_out_of_memory, one_line
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.registry import FAMILIES, SINGLE_FILE
from darkroom_server.engine.loading.checkpoint import pipeline_class_of, read_shapes
from darkroom_server.engine.loading.folder import (
    INDEX,
    absent_parts,
    check_weights,
    read_index,
    variant_of,
)
from darkroom_server.engine.loading.hub_errors import HUB_TIMEOUT, explain
from darkroom_server.engine.loading.ip_adapter import (
    IpAdapterFiles,
    find_ip_adapter,
    load_ip_adapter,
)
from darkroom_server.engine.loading.quantization import gguf_denoiser, is_packed, quantized_options
from darkroom_server.engine.weights.stored import stored_bytes

log = structlog.get_logger(__name__)

# This module logs what an operator needs; progress bars and advice are meant for notebooks.
diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The files of a model on this machine, before any weight is read.

    ``path`` is a pipeline's folder, or a single file. ``index`` is the folder's, and ``parts`` are
    its components with weights that are loaded; both are empty for a single file. ``ip_adapter`` is
    None without one.
    """

    source: ModelSource
    path: Path
    family: type[Family]
    index: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    ip_adapter: IpAdapterFiles | None = None


def find_model(source: ModelSource, *, safety_checker: bool) -> ModelFiles:
    """The files of ``source``, checked; downloads them from the hub. Raises ``StartupError``."""
    files = _find_files(source, safety_checker)
    if source.ip_adapter is None:
        return files
    if not files.family.takes_ip_adapter:
        raise StartupError(
            f"--ip-adapter {source.id}: a {files.family.pipeline_class} takes none here, only "
            "Stable Diffusion and SDXL do"
        )
    return replace(files, ip_adapter=find_ip_adapter(source.ip_adapter))


def _find_files(source: ModelSource, safety_checker: bool) -> ModelFiles:
    path = Path(source.location).expanduser()
    try:
        if path.is_file():
            return _find_single_file(source, path)
        folder = path if path.is_dir() else _download(source, safety_checker)
        return _find_folder(source, folder, safety_checker)
    except StartupError:
        raise
    except Exception as error:
        # The hub raises errors of any type.
        raise failed(source, "the model", error) from error


def load_pipeline(
    files: ModelFiles, dtype: torch.dtype, present: Mapping[str, Any] | None = None
) -> Any:
    """The diffusers pipeline of ``files``, on the CPU, with weights of ``dtype``.

    The components in ``present``, by their names, are taken as they are; only folders have some.
    Its class is that of ``files.family``. Reads safetensors only, and never runs remote code.
    Raises ``StartupError``.
    """
    try:
        if files.index:
            pipeline = _load_folder(files, dtype, present or {})
        else:
            pipeline = _load_single_file(files, dtype)
    except StartupError:
        raise
    except Exception as error:
        # diffusers, transformers and safetensors raise errors of any type.
        raise failed(files.source, "the model", error) from error
    if files.ip_adapter is not None and files.source.ip_adapter is not None:
        load_ip_adapter(pipeline, files.ip_adapter, files.source.ip_adapter)
    return pipeline


def weights_of(family: Family) -> dict[str, int]:
    """The bytes of each component's weights and buffers in memory."""
    names = (*family.components, "safety_checker", "image_encoder")
    parts = {name: getattr(family.pipeline, name, None) for name in names}
    return {
        name: sum(map(stored_bytes, (*part.parameters(), *part.buffers())))
        for name, part in parts.items()
        if part is not None
    }


def pipeline_class(family: type[Family]) -> Any:
    """The class of diffusers of a pipeline of ``family``."""
    return getattr(diffusers, family.pipeline_class)


def left_out(family: type[Family], safety_checker: bool) -> dict[str, None]:
    """The optional components that are not loaded, as diffusers' arguments."""
    wanted = ("safety_checker", "feature_extractor") if safety_checker else ()
    return dict.fromkeys(part for part in family.optional if part not in wanted)


def _find_folder(source: ModelSource, folder: Path, safety_checker: bool) -> ModelFiles:
    name = source.location
    family, index = read_index(folder, name)
    family.check_folder(folder, name)
    absent = absent_parts(family, index)
    wanted = [part for part in family.components if part not in absent]
    if safety_checker and index.get("safety_checker", [None])[0]:
        wanted.append("safety_checker")
    for part in wanted:
        if part != family.denoiser_name or source.quantize is None or not source.quantize.file:
            check_weights(folder, part, name)
    if source.variant and not any(variant_of(folder, part, source.variant) for part in wanted):
        raise StartupError(
            f"model {name!r} has no weights of variant {source.variant!r}: leave --variant out"
        )
    return ModelFiles(source=source, path=folder, family=family, index=index, parts=tuple(wanted))


def _load_folder(files: ModelFiles, dtype: torch.dtype, present: Mapping[str, Any]) -> Any:
    family = files.family
    parts = {
        part: present[part] if part in present else _load_part(files, part, dtype)
        for part in files.parts
    }
    absent = absent_parts(family, files.index)
    return pipeline_class(family).from_pretrained(
        str(files.path),
        local_files_only=True,
        **family.pipeline_options,
        **{**left_out(family, "safety_checker" in parts), **absent, **parts},
        **family.weightless_parts(files.path),
    )


def _load_part(files: ModelFiles, part: str, dtype: torch.dtype) -> Any:
    """One component of a pipeline, with every weight from its files."""
    source = files.source
    made_by: Any = component_class(files.index.get(part))
    if made_by is None:
        library, kind = files.index.get(part) or (None, None)
        raise StartupError(
            f"model {source.location!r}: its {part} is a {library}.{kind}, which is not supported"
        )
    try:
        if (denoiser := gguf_denoiser(files, part, made_by, dtype)) is not None:
            return denoiser
        # Packed weights do not know the conversions of inference mode.
        with torch.inference_mode(torch.is_inference_mode_enabled() and not is_packed(files, part)):
            model, report = made_by.from_pretrained(
                str(files.path),
                subfolder=part,
                dtype=dtype,
                variant=variant_of(files.path, part, source.variant),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **quantized_options(files, part, made_by, dtype),
            )
    except Exception as error:
        raise failed(source, f"its {part}", error) from error
    # The libraries only warn of missing weights, and fill them with random values.
    if missing := sorted(report["missing_keys"]):
        raise StartupError(
            f"model {source.location!r}: its {part} lacks {len(missing)} weights, such as "
            f"{missing[0]}; copy or download it again"
        )
    return model


def _download(source: ModelSource, safety_checker: bool) -> Path:
    """The folder in the hub's cache; downloads what is missing there."""
    name = source.location
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise StartupError(
            f"model folder {name!r} does not exist: give a pipeline's folder, a .safetensors file "
            "or a hub id"
        )
    if not source.may_download:
        return _cached(source, safety_checker)
    try:
        # The calls that follow wait for a silent hub for minutes or without a limit.
        huggingface_hub.model_info(
            name, revision=source.revision, token=source.token, timeout=HUB_TIMEOUT
        )
        return _snapshot(source, safety_checker, local_files_only=False)
    except StartupError:
        raise
    except Exception as error:
        log.debug("hub failed", exc_info=True)
        why, remedy = explain(error, source.revision, source.variant) or (
            one_line(error),
            "check its name, HF_TOKEN and the network, or give a folder",
        )
        # An earlier download works without the hub, the network and the token.
        with suppress(Exception):  # If the cache is unusable too, the hub's own error is raised.
            folder = _snapshot(source, safety_checker, local_files_only=True)
            family, index = read_index(folder, name)
            for part in set(family.components) - absent_parts(family, index).keys():
                check_weights(folder, part, name)
            log.warning("the hub's cache is used", model=name, hub=why)
            return folder
        raise StartupError(
            f"model {name!r} is not cached, and the hub does not provide it ({why}); {remedy}"
        ) from error


def _cached(source: ModelSource, safety_checker: bool) -> Path:
    """The folder in the hub's cache; raises ``StartupError`` if it is not complete."""
    try:
        return _snapshot(source, safety_checker, local_files_only=True)
    except StartupError:
        raise
    except Exception as error:
        log.debug("not in the hub's cache", exc_info=True)
        raise StartupError(
            f"model {source.location!r} is not on this machine; start the server with "
            "--allow-download, or download it"
        ) from error


def _snapshot(source: ModelSource, safety_checker: bool, *, local_files_only: bool) -> Path:
    """The folder in the hub's cache; asks the hub unless ``local_files_only``."""
    common: dict[str, Any] = {
        "revision": source.revision,
        "token": source.token,
        "local_files_only": local_files_only,
    }
    index = huggingface_hub.hf_hub_download(source.location, INDEX, **common)
    family, _ = read_index(Path(index).parent, source.location)
    with warnings.catch_warnings():
        # diffusers advises --variant in place of a branch called fp16, which older models have.
        warnings.simplefilter("ignore", FutureWarning)
        folder = pipeline_class(family).download(
            source.location,
            variant=source.variant,
            use_safetensors=True,
            **common,
            **left_out(family, safety_checker),
        )
    return Path(folder)


def _find_single_file(source: ModelSource, path: Path) -> ModelFiles:
    if path.suffix != ".safetensors":
        raise StartupError(
            f"model file {source.location!r} is not a .safetensors file: convert it to one, or "
            "give a pipeline's folder"
        )
    try:
        shapes = read_shapes(path)
    except Exception as error:  # safetensors has errors of several types.
        raise failed(source, "the model", error, "check the file") from error
    kind = pipeline_class_of(shapes, source.location)
    family = FAMILIES[kind] if kind else SINGLE_FILE
    if source.config is not None:
        folder = Path(source.config).expanduser()
        if not folder.is_dir():
            raise StartupError(f"--model-config {source.config}: no such folder")
        family, _ = read_index(folder, source.config)
        family.check_folder(folder, source.config)
    if kind not in (None, family.pipeline_class):
        raise StartupError(
            f"model file {source.location!r} is of a {kind}, and --model-config {source.config} of "
            f"a {family.pipeline_class}; give a folder of the file's architecture"
        )
    if not hasattr(pipeline_class(family), "from_single_file"):
        raise StartupError(
            f"model file {source.location!r}: diffusers reads no single file of a "
            f"{family.pipeline_class}; give a pipeline's folder"
        )
    return ModelFiles(source=source, path=path, family=family)


def _load_single_file(files: ModelFiles, dtype: torch.dtype) -> Any:
    source, family = files.source, files.family
    config = str(Path(source.config).expanduser()) if source.config is not None else None
    try:
        pipeline = pipeline_class(family).from_single_file(
            str(files.path),
            config=config,
            dtype=dtype,
            token=source.token,
            local_files_only=config is not None,
            **family.pipeline_options,
            **left_out(family, safety_checker=False),
        )
    except Exception as error:
        advice = "check the file" if config else "give --model-config FOLDER, or check the file"
        raise failed(source, "the model", error, advice) from error
    for part in family.components:
        if getattr(pipeline, part) is None:
            raise StartupError(
                f"model {source.location!r} has no {part}; check the file, and that --model-config "
                "is of its architecture"
            )
        # diffusers leaves a T5 of a file in training mode, whose dropout no seed repeats.
        getattr(pipeline, part).eval()
        weights = getattr(pipeline, part).state_dict()
        missing = [key for key, weight in weights.items() if weight.is_meta]
        if missing:
            raise StartupError(
                f"model {source.location!r}: its {part} lacks {len(missing)} weights, such as "
                f"{missing[0]}; check the file, and that --model-config is of its architecture"
            )
    return pipeline


def failed(
    source: ModelSource, what: str, error: Exception, advice: str = "copy or download it again"
) -> StartupError:
    """``error`` of ``what`` of a model, in one line for the operator.

    Raises ``error`` itself if an allocation failed.
    """
    if is_out_of_memory(error):
        raise error  # The caller knows the device.
    log.debug("model failed to load", exc_info=True)
    return StartupError(
        f"model {source.location!r}: {what} cannot be loaded ({one_line(error)}); {advice}"
    )
