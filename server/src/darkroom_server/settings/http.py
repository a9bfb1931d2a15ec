"""Settings of the HTTP door."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """The door for HTTP clients and browsers. TLS and tokens are those of gRPC."""

    http_port: Annotated[
        Annotated[int, Ge(0), Le(65535)] | None,
        Setting(
            "The port for HTTP; 0 picks a free one.",
            choose="Needs `darkroom-server[http]`. See docs/http.md.",
            metavar="PORT",
            default="off",
        ),
    ] = None
    http_host: Annotated[
        str,
        Setting(
            "The address to listen on for HTTP.",
            choose="As `--host`.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    http_hosts: Annotated[
        tuple[str, ...],
        Setting(
            "A name by which callers may address the server, without a port. May be given several "
            "times.",
            choose="IP addresses, `localhost` and the machine's own name are always accepted. A "
            "request for any other name is rejected, so that a web page cannot reach the server "
            "by DNS rebinding. `*` accepts every name, for a proxy that checks it.",
            metavar="NAME",
            default="none",
        ),
    ] = ()
    http_origins: Annotated[
        tuple[str, ...],
        Setting(
            "An origin whose web pages may call the server, such as `https://app.example`. May be "
            "given several times.",
            choose="The server's own page needs none. Requests of pages of any other origin are "
            "rejected.",
            metavar="ORIGIN",
            default="none",
        ),
    ] = ()
    http_url_key: Annotated[
        str | None,
        Setting(
            "A file with the key that signs the URLs of results: at least 32 bytes.",
            choose="For servers behind one name that must accept each other's URLs, or if URLs "
            "must stay valid when the server starts again.",
            metavar="FILE",
            default="a random key at each start",
        ),
    ] = None
    http_response_format: Annotated[
        Literal["b64_json", "url"],
        Setting(
            "What requests get that do not set `response_format`: the images, or signed URLs.",
            choose="`url` for clients of DALL·E that read URLs and cannot ask for them, such as "
            "LangChain's `DallEAPIWrapper`. Needs results that are kept.",
            metavar="FORMAT",
        ),
    ] = "b64_json"
    page: Annotated[
        bool,
        Setting(
            "Serve a page at `/` to try prompts in a browser.",
            choose="The page calls the API like any client, and needs a token if the API does.",
        ),
    ] = True
