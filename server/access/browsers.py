"""What keeps web pages of others from using the server through a visitor's browser: the check of the Host header, CORS,
and the headers of the page of docs."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from functools import lru_cache

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.refusals import Refusals
from server.http.error_responses import error_response
from server.settings import Settings, is_loopback

PROBES = frozenset({"/health", "/ready"})  # asked by address, by supervisors
SECONDS_OF_PREFLIGHTS = 600
KNOWN_HOSTS = 16  # Host headers that are not looked at again
EXPOSED_HEADERS = ("etag", "retry-after", "x-request-id", "www-authenticate")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'"  # of what is no page
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OF_PAGES = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
OF_OTHERS = [*OF_PAGES, (b"content-security-policy", CLOSED_POLICY.encode())]
INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class HostCheck:
    """Refuses requests for other hosts than the allowed ones and loopback. A page that has its own name resolve to
    127.0.0.1 (DNS rebinding) is same-origin with this server, and only the Host header tells it from a local client.

    `allowed` are names without a port; `*.example.com` allows every name below example.com.
    """

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...], refusals: Refusals) -> None:
        self._app = app
        self._allowed = tuple(name.lower() for name in allowed)
        self._refusals = refusals
        self._allows = lru_cache(KNOWN_HOSTS)(self._look_at)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self._app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")
        if self._allows(host):
            return await self._app(scope, receive, send)
        message = f"this server does not answer to the host {host[:100]!r}: name it with --allowed-hosts if it should"
        self._refusals.note(scope, "host_not_allowed")
        return await error_response(403, message, code="host_not_allowed")(scope, receive, send)

    def _look_at(self, header: str) -> bool:
        name = host_name(header)
        if name == "localhost" or name.endswith(".localhost") or _is_loopback_address(name):
            return True
        return any(name.endswith(one[1:]) if one.startswith("*.") else name == one for one in self._allowed)


def allowed_hosts(settings: Settings) -> tuple[str, ...] | None:
    """The hosts that a server answers to besides loopback ones, None for all. On loopback they are none by default."""
    on_loopback = settings.uds is None and is_loopback(settings.host)  # no browser connects to a unix socket
    if "*" in settings.allowed_host_names or not (settings.allowed_host_names or on_loopback):
        return None
    return settings.allowed_host_names


def host_name(header: str) -> str:
    """The lower-case name or address of a Host header, without its port and brackets."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::\d*)?", header)
    name = bracketed[1] if bracketed else re.sub(r":\d*$", "", header)
    return name.lower().removesuffix(".")


def _is_loopback_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class SecurityHeaders:
    """Adds headers that tell browsers to frame, guess and load nothing. A page may run its own scripts only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        held: Message | None = None  # the start of a page, until its scripts are known

        async def protected(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                given = dict(message["headers"])  # by lower-case names
                is_page = given.get(b"content-type", b"").startswith(b"text/html")
                added = (one for one in (OF_PAGES if is_page else OF_OTHERS) if one[0] not in given)
                message["headers"] = [*message["headers"], *added]
                if is_page:
                    held = message
                    return
            elif held is not None:
                MutableHeaders(scope=held)["content-security-policy"] = page_policy(message.get("body", b""))
                await send(held)
                held = None
            await send(message)

        return await self._app(scope, receive, protected)


def page_policy(page: bytes) -> str:
    """The policy for a page of one message, by the digests of its inline scripts."""
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE_SCRIPT.findall(page)]
    return PAGE_POLICY.format(scripts="".join(f" 'sha256-{digest}'" for digest in digests))


def with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """The application for web pages of these origins. It goes around everything, so that errors have the headers and
    preflights need no key. Keys are sent in a header, never as cookies, so credentials are not allowed."""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED_HEADERS),
        max_age=SECONDS_OF_PREFLIGHTS,
    )
