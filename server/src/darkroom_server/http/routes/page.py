"""``/``: the page to try prompts, as static files of this package."""

from importlib.resources import files

from starlette.responses import Response

from darkroom_server.http.call import Answer, Call
from darkroom_server.http.errors import HttpError

CONTENT_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
"""Content-Security-Policy: nothing of another origin, and nothing inline."""


class PageRoutes:
    """Serves the page; read once, at the start."""

    def __init__(self) -> None:
        folder = files("darkroom_server.http") / "page"
        self._files = {name: (folder / name).read_bytes() for name in CONTENT_TYPES}

    async def index(self, call: Call) -> Answer:
        """The page itself."""
        return self._file("index.html")

    async def file(self, call: Call) -> Answer:
        """A file of the page, by its name."""
        return self._file(call.path["file"])

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise HttpError(404, "unknown_path", "the page has no such file")
        headers = {
            "content-security-policy": POLICY,
            "content-type": CONTENT_TYPES[name],
            "cache-control": "no-cache",
        }
        return Response(self._files[name], headers=headers)
