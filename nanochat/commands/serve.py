"""Serve a model: a chat page in the browser, and an API for any OpenAI client."""

import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from nanochat.base.common import UserError, entry, opening, print0
from nanochat.base.hardware import total_memory
from nanochat.base.knobs import knob, parse
from nanochat.train.knobs import AnyModelKnobs, DeviceKnobs


@dataclass(kw_only=True)
class ServeKnobs(AnyModelKnobs, DeviceKnobs):
    """Server"""

    host: str = knob(
        "127.0.0.1", "address to listen on; one that other machines can reach needs an API key"
    )
    port: int = knob(8000, "port to listen on; 0 = any free one", alias="-p", low=0, high=65535)
    api_key: str = knob(
        "", "key that clients must send (default: generated and printed if the host needs one)"
    )
    allow_origin: tuple[str, ...] = knob((), "other web origins whose pages may use the API")
    allow_host: tuple[str, ...] = knob(
        (), "other host names by which clients may address the server"
    )
    max_rows: int = knob(32, "maximum answers decoded together", low=1, high=512)
    kv_gb: float = knob(
        0.0,
        "memory for keys and values in GB (0 = a quarter of main memory, or of what is free on "
        "the GPU), for each of up to two models",
        low=0,
    )


def allowed_hosts(values: ServeKnobs) -> list[str]:
    """
    The host names under which the server answers: localhost, the address that it listens on, those
    of --allow_host and, if it listens on all addresses, the name of this machine.
    """
    from nanochat.chat.serve.guard import EVERYWHERE, LOOPBACK

    name = socket.gethostname()
    own = [name, f"{name}.local"] if values.host in EVERYWHERE else []
    return [*LOOPBACK, values.host, *own, *values.allow_host]


def default_kv_bytes(device_type: str) -> float:
    """The bytes for keys and values of one model if --kv_gb is 0."""
    import torch

    from nanochat.base.runtime import choose_device
    from nanochat.chat.serve.models import MOST_LOADED

    device = choose_device(device_type)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if on_gpu else total_memory()
    return 0.5 * memory / MOST_LOADED


def network_address() -> str:
    """The address of this machine in its network, "" without one. Sends nothing."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.connect(("192.0.2.1", 9))  # an address for documentation, which nobody has
        return unused.getsockname()[0]
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    values, _ = parse(ServeKnobs, argv, command="serve")
    opening("serve")
    try:
        from nanochat.chat.serve.app import build_app
        from nanochat.chat.serve.guard import EVERYWHERE, LOOPBACK, Guard
        from nanochat.chat.serve.server import Server, listen
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("fastapi", "uvicorn", "pydantic", "starlette"):
            raise
        raise UserError(
            f"the package {package} is not installed: install what the server needs with "
            'pip install -e ".[serve]"'
        ) from None

    from nanochat.chat.serve.models import Models
    from nanochat.model.checkpoint import choose

    stage, checkpoint = choose(values.source, values.model_tag, values.step)
    checkpoint.config  # noqa: B018 (fails early and clearly)
    checkpoint.tokenizer()  # and so does this
    listener = listen(values.host, values.port)
    key = values.api_key
    if values.host not in LOOPBACK and not key:
        key = secrets.token_urlsafe(24)
        print0(f"API key (other machines can reach this address): {key}")
    kv_bytes = values.kv_gb * 1e9 or default_kv_bytes(values.device_type)
    models = Models(values.max_rows, kv_bytes, device_type=values.device_type, dtype=values.dtype)
    app = build_app(models, {"stage": stage, "tag": checkpoint.tag, "step": checkpoint.step})
    guarded = Guard(app, allowed_hosts(values), key, values.allow_origin)
    server = Server(guarded, models)
    shown = f"[{values.host}]" if ":" in values.host else values.host
    if values.host in (*LOOPBACK, *EVERYWHERE):
        shown = "localhost"
    port = listener.getsockname()[1]
    print0(
        f"http://{shown}:{port} for the page, http://{shown}:{port}/v1 for OpenAI clients; "
        "Ctrl+C stops"
    )
    if values.host in EVERYWHERE and (address := network_address()):
        print0(f"http://{address}:{port} for other machines in the same network")
    server.run(sockets=[listener])
    sys.stdout.flush()


if __name__ == "__main__":
    entry(main)
