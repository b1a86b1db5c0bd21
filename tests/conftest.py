"""
What holds for all tests: they have a base folder of their own, so that none writes to that of the
user, too many shapes for the compiler are an error, where torch would only stop compiling, and
signals work in a background job too, and a process measures its machine's speed once. Fixtures of
several files stand here too.
"""

import functools
import gc
import os
import random
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from nanochat.base import hardware

RELEASE = Path(__file__).resolve().parent / "golden" / "release_0.1"

# The files whose tests take longest, the longest first
LONGEST = """
serve quickstart resume plan_memory budget generate strangers house chat_cli export scripts
gpu_first plan_recipe tinyworld mine comparison sandbox install loop plan_day run int8 compiler
gpt cuda_code distributed tasks checkpoint evaluation runtime core plan_probe hardware graphs
models readers
"""


def pytest_configure(config):
    """Several processes take the files in the order below, and not those with most tests first."""
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files come first, so that no process is alone with one of them at the end."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_collected():
    """
    Leave what is there when the tests of a file begin out of garbage collection: tests, torch and
    its compiler are a million objects. To visit them takes seconds, in each test in which memory
    runs out.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored():
    """A shell's background jobs ignore Ctrl+C, and nohup ignores SIGHUP, in all that they start."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    for name, handler in handlers.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def base_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        # What commands set for their process would else stay for all later tests
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        yield


@pytest.fixture(scope="session", autouse=True)
def speed_is_measured_once():
    """Every run that a test starts would take the better part of a second for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("measured_peak", "faster_dtype"):
            patch.setattr(hardware, name, functools.cache(getattr(hardware, name)))
        yield


@pytest.fixture(autouse=True)
def no_silent_return_to_eager():
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.fail_on_recompile_limit_hit = True


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An empty base folder."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def is_here(host: object) -> bool:
    """Whether a host is this machine itself."""
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1", "0.0.0.0") or str(name).startswith("127.")


@pytest.fixture
def offline(monkeypatch):
    """
    There is no network: the hosts that somebody asks for all the same, whether or not they take the
    failure well. A test that expects some must clear the list.
    """
    asked: list[str] = []

    def refuse(host: object, error: OSError) -> None:
        if not is_here(host):
            asked.append(str(host))
            raise error

    def connecting(real):
        def connect(sock, address):
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0], OSError(101, "Network is unreachable"))
            return real(sock, address)

        return connect

    def resolving(real):
        def resolve(host, *rest, **options):
            refuse(host, socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
            return real(host, *rest, **options)

        return resolve

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connecting(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, resolving(getattr(socket, name)))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # one on this machine would ask for us
    yield asked
    assert asked == [], "this needs no network"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """
    The base folder of an earlier release, with small models; the data lies in the current folder,
    as when they were trained.
    """
    shutil.copytree(RELEASE, tmp_path / "release")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "release"))
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"
