"""The folder in which models appear and vanish while a server runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from darkroom_server.core.engine_config import ModelSource


@dataclass(frozen=True, slots=True)
class ModelsFolder:
    """The models of ``--models-dir``: by id those ``at_start``, and with ``find`` those now.

    ``find`` reads names only, and returns None if the folder itself is not there, such as one of
    another machine that is out of reach.
    """

    at_start: Mapping[str, ModelSource]
    find: Callable[[], tuple[ModelSource, ...] | None]
