"""Which path is answered by which handler, and who may call it."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property

from darkroom_server.http.call import Answer, Call

UNKNOWN_PATH = "unknown"
"""The label of every path that is not the server's own."""

MAX_JSON_BYTES = 1024**2
"""As over gRPC: requests are prompts and numbers."""

PARAMETER = re.compile(r"\{(\w+)\}")


class Access(Enum):
    """Who may call a route if tokens are needed."""

    OPEN = auto()
    TOKEN = auto()
    ADMIN = auto()


@dataclass(frozen=True)
class Route:
    """One path with its only method; ``path`` may have parameters, such as ``/v1/models/{id}``."""

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Answer]]
    access: Access = Access.TOKEN
    max_body: int = MAX_JSON_BYTES

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Odd parts are the names of parameters. The last one may contain slashes: ids of models do.
        parts = PARAMETER.split(self.path)
        pattern = ""
        for index, part in enumerate(parts):
            last = index == len(parts) - 2 and not parts[-1]
            pattern += f"(?P<{part}>{'.+' if last else '[^/]+'})" if index % 2 else re.escape(part)
        return re.compile(pattern)

    def matches(self, path: str) -> dict[str, str] | None:
        """The parameters in ``path``, None if it is another route's."""
        found = self._pattern.fullmatch(path)
        return found.groupdict() if found else None


def find_route(routes: Sequence[Route], path: str) -> tuple[Route | None, dict[str, str]]:
    """The route of ``path`` and its parameters; None if there is none."""
    for route in routes:
        if (found := route.matches(path)) is not None:
            return route, found
    return None, {}
