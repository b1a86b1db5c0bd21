"""
The beginning and the end of a server: the socket it listens on, connections that do not send their
requests, and a shutdown in good order.
"""

import asyncio
import errno
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.base.common import UserError
from nanochat.chat.serve.guard import App, is_loopback
from nanochat.chat.serve.models import Models

GRACE_SECONDS = 5  # that running answers have to end after Ctrl+C or SIGTERM
HEADER_SECONDS = 10  # from the connection, or the first byte of a further request, to its headers
# Between an answer and the next request. Python's clients (httpx) keep connections for 5 seconds: a
# server that closes them at the same moment meets a request.
KEEP_ALIVE_SECONDS = 10
MOST_CONNECTIONS = 512  # of all clients; further ones get status 503
CLIENT_CONNECTIONS = 64  # of one client on another machine; further ones are closed


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address; UserError where that is not possible."""
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
    Uvicorn's HTTP, which closes idle connections and bounds the size of headers but waits for them
    without limit. Here a connection must bring whole headers within HEADER_SECONDS, and another
    machine may hold CLIENT_CONNECTIONS.
    """

    _expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        clients = [getattr(other, "client", None) for other in self.connections]
        held = sum(bool(client) and client[0] == host for client in clients)
        if held > CLIENT_CONNECTIONS and not is_loopback(host):
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        """Start the clock where headers are still to come, stop it where they have come."""
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
    Uvicorn with quiet logs. On Ctrl+C or SIGTERM it accepts nothing more; answers that still run
    after GRACE_SECONDS end with an error that says why.
    """

    def __init__(self, app: App, models: Models):
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
