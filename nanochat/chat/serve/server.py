"""
Starting and stopping a server: the socket it listens on, limits on slow and numerous connections,
and an orderly shutdown.
"""

import asyncio
import errno
import socket

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.base.common import UserError
from nanochat.chat.serve.guard import is_loopback
from nanochat.chat.serve.models import Models

GRACE_SECONDS = 5  # that running answers have to end after Ctrl+C or SIGTERM
HEADER_SECONDS = 10  # from the connection, or the first byte of a further request, to its headers
# Between an answer and the next request. Python's clients (httpx) keep connections for 5 seconds:
# if the server closed them at the same moment, a request could be lost.
KEEP_ALIVE_SECONDS = 10
MOST_CONNECTIONS = 512  # of all clients; further ones get status 503
CLIENT_CONNECTIONS = 64  # of one client on another machine; further ones are closed


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)  # from now on clients wait instead of being refused
    except OSError as error:
        listener.close()
        flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another {flag}"
        ) from None
    return listener


class Protocol(H11Protocol):
    """
    Uvicorn's HTTP, which closes idle connections and bounds the size of headers, but waits for them
    without limit. Here a connection must send all headers within HEADER_SECONDS, and a client on
    another machine may have at most CLIENT_CONNECTIONS.
    """

    _expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        clients = [getattr(other, "client", None) for other in self.connections]
        hosts = [client[0] for client in clients if client]
        if hosts.count(host) > CLIENT_CONNECTIONS and not is_loopback(host):
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        """Start the timer while headers are missing, and stop it when they have arrived."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._expiry is None:
            self._expiry = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _stop_watching(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None


class Server(uvicorn.Server):
    """
    Uvicorn with quiet logs. On Ctrl+C or SIGTERM it accepts no more requests; answers that are not
    complete after GRACE_SECONDS end with an error that says why.
    """

    def __init__(self, app: ASGIApp, models: Models):
        self.models = models
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_SECONDS + 3,
                server_header=False,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for worker in self.models.workers():
            worker.close(GRACE_SECONDS)
        await super().shutdown(sockets)
