"""A pipeline without weights: its modules are on the meta device, made from configurations."""

from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.loaders.single_file_utils import fetch_diffusers_config

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.components.classes import component_class
from darkroom_server.engine.loading.checkpoint import read_shapes
from darkroom_server.engine.loading.folder import INDEX, absent_parts, read_index
from darkroom_server.engine.loading.pipeline import ModelFiles, failed, left_out, pipeline_class

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.jinja"]
"""The files of a repository without weights."""


def meta_pipeline(files: ModelFiles) -> Any:
    """The pipeline of ``files`` without its weights. Raises ``StartupError``."""
    try:
        folder = files.path if files.index else _folder_of_file(files)
        index = files.index or read_index(folder, str(folder))[1]
        family = files.family
        absent = absent_parts(family, index)
        wanted = files.parts or [part for part in family.components if part not in absent]
        parts = {part: _module(folder, part, index.get(part)) for part in wanted}
        return pipeline_class(family).from_pretrained(
            str(folder),
            local_files_only=True,
            **family.pipeline_options,
            **{**left_out(family, "safety_checker" in parts), **absent, **parts},
            **family.weightless_parts(folder),
        )
    except StartupError:
        raise
    except Exception as error:
        # diffusers and transformers raise errors of any type.
        raise failed(files.source, "its configuration", error) from error


def configuration_from_hub(source: ModelSource) -> ModelFiles:
    """The files of a model on the hub, without its weights. Raises ``StartupError``."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                source.location,
                revision=source.revision,
                token=source.token,
                allow_patterns=CONFIGURATION,
            )
        )
    except Exception as error:
        # The hub raises errors of any type.
        raise failed(
            source, "its configuration", error, "check its name and the network"
        ) from error
    family, index = read_index(folder, source.location)
    family.check_folder(folder, source.location)
    absent = absent_parts(family, index)
    parts = tuple(part for part in family.components if part not in absent)
    return ModelFiles(source=source, path=folder, family=family, index=index, parts=parts)


def _module(folder: Path, part: str, entry: Any) -> Any:
    made_by: Any = component_class(entry)
    if made_by is None:
        raise StartupError(f"its {part} is a {entry}, which is not supported")
    with torch.device("meta"):
        if issubclass(made_by, diffusers.ModelMixin):
            config = made_by.load_config(str(folder), subfolder=part, local_files_only=True)
            return made_by.from_config(config).eval()
        assert issubclass(made_by, transformers.PreTrainedModel)
        read: Any = made_by.config_class
        config = read.from_pretrained(str(folder), subfolder=part, local_files_only=True)
        return made_by(config).eval()


def _folder_of_file(files: ModelFiles) -> Path:
    """The pipeline folder that describes a single file: ``--model-config``, or the hub's."""
    source = files.source
    if source.config is not None:
        return Path(source.config).expanduser()
    found = fetch_diffusers_config(read_shapes(files.path))
    name = found["pretrained_model_name_or_path"]
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=CONFIGURATION,
            token=source.token,
            local_files_only=not source.may_download,
        )
    except Exception as error:
        # The hub raises errors of any type.
        raise StartupError(
            f"model file {source.location!r} is described by {name}, whose {INDEX} is not on this "
            "machine; give --model-config FOLDER, or --allow-download"
        ) from error
    return Path(folder)
