"""Keys of the components of models: those with equal keys have equal weights in memory.

A key is made of the digests of the files with weights, of what the configuration says of the
module, and of how the component is stored here.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from darkroom_server.engine.loading.folder import variant_of
from darkroom_server.engine.loading.offloading import offloaded_parts
from darkroom_server.engine.loading.pipeline import ModelFiles, pipeline_class
from darkroom_server.engine.loading.quantization import is_packed
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.weights.digests import digest_of_all

ORIGIN = frozenset(
    {"_diffusers_version", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}
)
"""Fields of a configuration that say who saved a component, from where, and in which type.

The module does not depend on them: each load sets the type of all weights itself.
"""


def part_keys(files: ModelFiles, runtime: Runtime) -> dict[str, str]:
    """A key of each part that is equal for equal weights in an equal format. Raises ``OSError``.

    A single file has none, and neither have models with an IP-Adapter, which changes the UNet.
    """
    if not files.index or files.ip_adapter is not None:
        return {}
    return {part: _key(files, runtime, part) for part in files.parts}


def _key(files: ModelFiles, runtime: Runtime, part: str) -> str:
    folder = files.path / part
    found = sorted(folder.glob("*"))
    # Pipelines look at the version of diffusers that saved a UNet.
    whole = part == files.family.denoiser_name
    described = [
        files.index.get(part),
        _form(files, runtime, part),
        digest_of_all((file for file in found if file.suffix == ".safetensors"), folder),
        {file.name: _configuration(file, whole=whole) for file in found if file.suffix == ".json"},
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _form(files: ModelFiles, runtime: Runtime, part: str) -> list[Any]:
    """All that decides how the weights of ``part`` are stored, beside its files.

    The kind of pipeline decides it for a denoiser. The VAE's layout and type depend on traits of
    the pipeline that others have too, and text encoders depend on nothing of it.
    """
    family = files.family
    form = [
        runtime.dtype_name,
        runtime.quantization if is_packed(files, part) else "",
        variant_of(files.path, part, files.source.variant),
        part in offloaded_parts(family, runtime),
    ]
    library, _ = files.index.get(part) or (None, None)
    if part.startswith("text_encoder") and library == "transformers":
        return form
    layout = [runtime.channels_last and family.convolutional, runtime.vae_channels_last]
    if part == "vae":
        upcasts = hasattr(pipeline_class(family), "upcast_vae")
        return [*form, *layout, runtime.vae_tiling, upcasts]
    own = [runtime.attention, runtime.slice_size, runtime.fp8_storage, family.pipeline_class]
    return [*form, *layout, *own]


def _configuration(file: Path, *, whole: bool) -> Any:
    """What ``file`` says of a module; its text if it is damaged, of which the load says more."""
    data = file.read_bytes()
    try:
        found = json.loads(data)
    except ValueError:
        return data.hex()
    return found if whole else _without_origin(found)


def _without_origin(configuration: Any) -> Any:
    """``configuration``, and those of its parts, without the fields of ``ORIGIN``."""
    if not isinstance(configuration, dict):
        return configuration
    return {
        name: _without_origin(value) if name.endswith("_config") else value
        for name, value in configuration.items()
        if name not in ORIGIN
    }
