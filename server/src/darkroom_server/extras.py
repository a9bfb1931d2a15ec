"""Parts whose libraries are extras of the package."""

import importlib
from types import ModuleType

from darkroom_server.core.errors import StartupError

HTTP_LIBRARIES = ("h11", "python_multipart", "starlette", "uvicorn")


def http_door() -> ModuleType:
    """The package of the HTTP door; raises ``StartupError`` if its libraries are missing."""
    try:
        return importlib.import_module("darkroom_server.http.assembly")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise StartupError(
            f"--http-port needs {error.name}: pip install 'darkroom-server[http]'"
        ) from None
