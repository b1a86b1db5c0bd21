"""runtime: refusals, memory that glibc keeps, and halving a batch until it fits."""

import platform
import socket
import weakref
from datetime import timedelta

import pytest
import tiny
import torch

from nanochat.base import runtime
from nanochat.base.common import RankLost, UserError
from nanochat.base.runtime import halve_until_it_fits, open_runtime, out_of_memory


class Activations:
    """Stands for the memory that a failed attempt holds."""


def test_a_batch_is_halved_until_it_fits(capsys):
    tried = []

    def attempt(rows: int) -> str:
        tried.append(rows)
        if rows > 3:
            raise RuntimeError("CUDA out of memory")
        return f"{rows} rows"

    assert halve_until_it_fits(attempt, 13, "a validation batch") == ("3 rows", 3)
    assert tried == [13, 6, 3]
    assert "a validation batch of 6 rows: continuing with 3" in capsys.readouterr().err


def test_memory_of_a_failed_attempt_is_free_before_the_next():
    alive = []

    def attempt(rows: int) -> int:
        assert [a() for a in alive if a() is not None] == []
        activations = Activations()
        alive.append(weakref.ref(activations))
        if rows > 1:
            raise RuntimeError("out of memory")
        return rows

    assert halve_until_it_fits(attempt, 4) == (1, 1)
    assert len(alive) == 3


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_do():
    def attempt(rows: int) -> None:
        raise RuntimeError("not enough memory")

    with pytest.raises(UserError, match=r"a reply batch of 1 row.*smaller model"):
        halve_until_it_fits(attempt, 2, "a reply batch")


def test_other_errors_pass_through():
    error = RuntimeError("shapes do not match")
    assert not out_of_memory(error)

    def attempt(rows: int) -> None:
        raise error

    with pytest.raises(RuntimeError, match="shapes"):
        halve_until_it_fits(attempt, 8)


def test_what_the_machine_does_not_have_is_refused(monkeypatch):
    with pytest.raises(UserError, match="no device 'tpu': choose auto, cuda, mps, cpu"):
        open_runtime("tpu")
    with pytest.raises(UserError, match="no dtype 'int8': choose auto, float32"):
        open_runtime("cpu", "int8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="use --device_type=cpu"):
        open_runtime("cuda")


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_whose_partner_never_comes_ends_with_a_sentence(monkeypatch, alone):
    monkeypatch.setattr(runtime, "JOINING", timedelta(seconds=0.5))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        values = {"RANK": alone, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        if alone == 0:  # it listens there itself, and the other one finds nobody
            held.close()
        with pytest.raises(RankLost, match="not all 2 ranks of the run joined") as e:
            open_runtime("cpu")
    assert e.value.aloud


def test_a_compiler_that_fails_says_why(monkeypatch):
    """A small function is tried once on a GPU; what it lacks is named, whatever it is."""
    cuda, calls = torch.device("cuda", 0), []

    def compile(f, **_):
        calls.append(f)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", compile)
    runtime.compiler_fails.cache_clear()
    try:
        for _ in range(2):
            missing = runtime.compiler_missing(cuda)
            assert missing == "RuntimeError: Failed to find C compiler. Please specify via CC"
        assert len(calls) == 1
        monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: x)
        monkeypatch.setattr(torch, "ones", lambda *_, **__: 1)
        runtime.compiler_fails.cache_clear()
        assert runtime.compiler_missing(cuda) == ""
    finally:
        runtime.compiler_fails.cache_clear()


@pytest.mark.parametrize(("capability", "emulated"), [((7, 5), True), ((8, 0), False)])
def test_cards_before_ampere_orthogonalise_in_float32(monkeypatch, capability, emulated):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda", 0)
    assert runtime.emulates_bfloat16(cuda) == emulated
    assert not runtime.emulates_bfloat16(torch.device("cpu"))
    rt = runtime.Runtime(cuda, torch.float16, 0, 1, 42)
    expected = torch.float32 if emulated else torch.bfloat16
    assert tiny.optimizer(tiny.model(), rt).ns_dtype is expected


def test_glibc_keeps_freed_memory(tmp_path):
    """In a process of its own: allocating a freed block again costs no page faults."""
    code = (
        "import resource, torch; from nanochat.base.runtime import keep_freed_memory\n"
        "kept = keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.ones(16 * 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(kept, faults())"
    )
    process = tiny.start_program(code, tmp_path)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    kept, faults = (tmp_path / "stdout").read_text().split()
    assert (kept == "True") == (platform.libc_ver()[0] == "glibc")
    assert kept == "False" or int(faults) < 1000  # 20 blocks of 64 MB: 327,680 pages of 4 KB
