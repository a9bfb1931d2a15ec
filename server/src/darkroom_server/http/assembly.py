"""Puts the HTTP door together."""

import ssl
from collections.abc import Sequence

from darkroom_server.core.caller import Caller
from darkroom_server.dispatch import Dispatcher, PeerAddresses
from darkroom_server.http.browser import BrowserRules
from darkroom_server.http.call import Callers
from darkroom_server.http.door import HttpDoor, HttpObserver, RejectionObserver
from darkroom_server.http.routes.table import routes_of
from darkroom_server.http.server import HttpServer
from darkroom_server.http.signed_urls import SignedUrls
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.generation import GenerationService


def http_server(
    service: GenerationService,
    dispatcher: Dispatcher,
    requests: HttpObserver,
    rejections: RejectionObserver,
    *,
    hosts: Sequence[str],
    origins: Sequence[str],
    page: bool,
    result_ttl: float,
    url_key: str | None,
    urls_by_default: bool,
    begin_traces: bool,
    tokens: Tokens | None,
    addresses: PeerAddresses,
    anonymous: Caller,
    tls: ssl.SSLContext | None,
) -> HttpServer:
    """A server of ``service`` over HTTP that is not started; raises ``StartupError``.

    ``result_ttl``: seconds that results are kept, 0 if they are not. The rest is as in
    ``BrowserRules``, ``Callers`` and ``SignedUrls``.
    """
    urls = SignedUrls(result_ttl, url_key, by_default=urls_by_default)
    door = HttpDoor(
        routes_of(service, dispatcher, urls, page=page),
        Callers(tokens, addresses, anonymous, begin_traces=begin_traces),
        BrowserRules(hosts, origins),
        requests,
        rejections,
    )
    return HttpServer(door, tls)
