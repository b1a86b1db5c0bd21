"""
Access control, as pure ASGI (a wrapped request would hide that its client has disconnected).

It checks the Host header against a list (DNS rebinding), the Origin of browsers, the content type
(a form of another page cannot send JSON), the API key in constant time, the size of the body, the
time that a client takes, and how many requests another machine makes at once; and it adds the
headers that isolate the page from other sites. It logs nothing.
"""

import asyncio
import ipaddress
import secrets
from collections import Counter
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.chat.serve.app import PAGE
from nanochat.chat.serve.requests import ApiError

MOST_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0  # for the whole body to come
UNREAD_SECONDS = 30.0  # for a client to read a piece of an answer
TOTAL_SECONDS = 660.0  # for a request and its answer
CLIENT_REQUESTS = 32  # of one client on another machine, at once
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # hosts that mean every address of this machine
OPEN_PATHS = ("/health", *PAGE)  # for which no API key is needed
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; "
    b"connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
}


def host_name(host: str) -> str:
    """
    The name in a Host header or an origin's authority, without the port: "[::1]:8000" -> "::1".
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def is_address(host: str) -> bool:
    """Whether a host is an address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; "" (a socket without an address) counts as such."""
    return not host or (is_address(host) and ipaddress.ip_address(host).is_loopback)


class Guard:
    """
    Wraps an ASGI app. `hosts` are the names by which the server may be addressed; with one of
    EVERYWHERE among them, every address is allowed too, because DNS rebinding needs a name.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] = LOOPBACK,
        api_key: str = "",
        allowed_origins: Iterable[str] = (),
    ):
        self.app, self.api_key = app, api_key
        self.hosts = {host.lower() for host in hosts}
        self.any_address = not self.hosts.isdisjoint(EVERYWHERE)
        self.asking: Counter[str] = Counter()  # requests under way, by address
        self.allowed_origins = {origin.rstrip("/").lower() for origin in allowed_origins}

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a request that is not allowed."""
        host = headers.get("host", "")
        name = host_name(host)
        if name not in self.hosts and not (self.any_address and is_address(name)):
            raise ApiError(
                403,
                f"this server does not answer to the host {host[:80]!r}: start it with "
                "--allow_host NAME",
            )
        origin = headers.get("origin", "").rstrip("/").lower()
        own = origin.partition("://")[2] == host.lower()
        if origin and not own and origin not in self.allowed_origins:
            raise ApiError(
                403,
                f"the origin {origin[:80]!r} may not use this server: start it with "
                "--allow_origin ORIGIN",
            )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "send the body with Content-Type: application/json")
        if self.api_key and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            matches = secrets.compare_digest(given.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not matches:
                raise ApiError(
                    401,
                    "a valid API key is needed: send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin", "")
        if origin.rstrip("/").lower() not in self.allowed_origins:
            return []
        wanted = headers.get("access-control-request-headers", "authorization, content-type")
        return [
            (b"access-control-allow-origin", origin.encode()),
            (b"access-control-allow-headers", wanted.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"Origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        cors = self._cors(headers)
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS.items(), *cors]
                started = True
            async with asyncio.timeout(UNREAD_SECONDS):
                await send(message)

        host = (scope.get("client") or ("",))[0]
        self.asking[host] += 1
        try:
            self._check(scope, headers)
            if self.asking[host] > CLIENT_REQUESTS and not is_loopback(host):
                raise ApiError(
                    429,
                    f"{CLIENT_REQUESTS} requests from {host} are under way: try again later",
                    code="too_many_requests",
                    headers={"Retry-After": "2"},
                )
            if scope["method"] == "OPTIONS" and cors:
                await Response(status_code=204)(scope, receive, send_guarded)
                return
            async with asyncio.timeout(TOTAL_SECONDS):
                await self.app(scope, _bounded(receive), send_guarded)
        except ApiError as error:
            await error.response(scope, receive, send_guarded)
        except ClientDisconnect:  # the client left while it sent its body
            return
        except TimeoutError:
            if not started:  # else returning here makes uvicorn close the connection
                error = ApiError(503, "the answer took too long: ask for fewer tokens")
                await error.response(scope, receive, send_guarded)
        finally:
            self.asking -= Counter([host])  # also removes zeros


def _bounded(receive: Receive) -> Receive:
    """`receive` for a body that comes within BODY_SECONDS and is not too large."""
    received, complete = 0, False
    latest = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_bounded() -> Message:
        nonlocal received, complete
        if complete:  # the next message says that the client has disconnected
            return await receive()
        try:
            async with asyncio.timeout_at(latest):
                message = await receive()
        except TimeoutError:
            why = f"the body did not arrive within {BODY_SECONDS:.0f} s: send it again"
            raise ApiError(408, why, headers={"Connection": "close"}) from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body")
        if received > MOST_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BODY_BYTES:,} bytes: shorten it")
        return message

    return receive_bounded
