"""From a folder, a single file or a hub id to a diffusers pipeline in memory."""

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch
import transformers

from darkroom_server.core.config import ModelSource
from darkroom_server.core.errors import StartupError

log = structlog.get_logger(__name__)

# What matters of loading is said by this module; bars and advice meant for notebooks are not.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SUPPORTED = "StableDiffusionPipeline"


def load_pipeline(source: ModelSource, dtype: torch.dtype, *, safety_checker: bool) -> Any:
    """The ``StableDiffusionPipeline`` of ``source``, on the CPU, with weights of ``dtype``.

    Safetensors only, never remote code. Raises ``StartupError``.
    """
    path = Path(source.location)
    try:
        if path.is_file():
            return _load_single_file(source, path, dtype)
        return _load_pretrained(source, path, dtype, safety_checker)
    except StartupError:
        raise
    except Exception as error:
        # diffusers, transformers, safetensors and the hub raise whatever they like.
        log.debug("model failed to load", exc_info=True)
        raise StartupError(
            f"model {source.location!r} cannot be loaded: {_one_line(error)}"
        ) from error


def revision_of(source: ModelSource, pipeline: Any) -> str:
    """The hub's commit, or a fingerprint of the files where the model is local."""
    path = Path(source.location)
    if path.is_file():
        return _fingerprint([path], path.parent)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.suffix in (".json", ".txt", ".safetensors")]
        return _fingerprint(sorted(files), path)
    # What came from the hub lies in its cache, under snapshots/COMMIT/unet.
    parts = Path(str(pipeline.unet.config.get("_name_or_path", ""))).parts
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") + 1]
    return source.revision or "unknown"


def _load_pretrained(
    source: ModelSource, path: Path, dtype: torch.dtype, safety_checker: bool
) -> Any:
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise StartupError(f"model folder {source.location!r} has no model_index.json")
        _check_kind(source, json.loads(index.read_text(encoding="utf-8")))
    elif source.location.startswith((".", "/", "~")) or source.location.count("/") > 1:
        raise StartupError(f"model folder {source.location!r} does not exist")
    else:
        config = diffusers.DiffusionPipeline.load_config(
            source.location, revision=source.revision, token=source.token
        )
        _check_kind(source, config)
    optional = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline.from_pretrained(
        source.location,
        dtype=dtype,
        revision=source.revision,
        variant=source.variant,
        token=source.token,
        use_safetensors=True,
        **optional,
    )


def _load_single_file(source: ModelSource, path: Path, dtype: torch.dtype) -> Any:
    if path.suffix != ".safetensors":
        raise StartupError(f"model file {source.location!r} is not a .safetensors file")
    return diffusers.StableDiffusionPipeline.from_single_file(
        str(path),
        config=source.config,
        dtype=dtype,
        token=source.token,
        local_files_only=source.config is not None,
    )


def _check_kind(source: ModelSource, index: dict[str, Any]) -> None:
    kind = index.get("_class_name")
    if kind != SUPPORTED:
        raise StartupError(
            f"model {source.location!r} is a {kind}, which is not supported; "
            f"Darkroom serves {SUPPORTED} models"
        )


def _fingerprint(files: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]
