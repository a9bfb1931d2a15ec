"""The classes of a pipeline's components, as ``model_index.json`` names them."""

from typing import Any

import diffusers
import transformers


def component_class(entry: Any) -> type | None:
    """The class of ``entry``, which is a library and a name; None if Darkroom does not load it.

    Classes are those of diffusers and transformers, and nothing else is imported.
    """
    library, kind = entry or (None, None)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    # As in diffusers, a pipeline may have components of its own, in its own module.
    module = libraries.get(str(library)) or getattr(diffusers.pipelines, str(library), None)
    found = getattr(module, str(kind), None)
    return found if isinstance(found, type) else None
