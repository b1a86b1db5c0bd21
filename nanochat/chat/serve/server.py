"""The beginning and the end of a server: the socket it listens on, and a shutdown in good order."""

import errno
import socket

import uvicorn

from nanochat.base.common import UserError
from nanochat.chat.serve.guard import App
from nanochat.chat.serve.models import Models

GRACE_SECONDS = 5  # that running answers have to end after Ctrl+C or SIGTERM


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
                log_level="warning",
                access_log=False,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=GRACE_SECONDS + 3,
                server_header=False,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for worker in self.models.workers():
            worker.close(GRACE_SECONDS)
        await super().shutdown(sockets)
