"""Two gloo ranks do what one does: losses, weights, odd tables, checkpoints passed between them."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toy
from safetensors.torch import load_file, save_file

from nanochat.base import hardware, logbook
from nanochat.base.files import sha256_file
from nanochat.commands import base_train
from nanochat.data.feed import Batch
from nanochat.model import checkpoint
from nanochat.train import horizon, loop, stage
from nanochat.train.loop import Evaluation, Interrupted, recut
from nanochat.train.optim import Group, MuonAdamW
from nanochat.train.schedule import Schedule

STEPS, STOP = 6, 3
SHAPES = {
    "muon": [(16, 8), (16, 8), (16, 8), (8, 16), (5, 7)],
    "adamw": [(7, 3), (64, 4), (2, 2), (1, 6)],
}
SCHEDULE = Schedule(decay=0.5, momentum_warmup=4)


class Share(tiny.ListFeed):
    """One rank's share of every step: unequal, once empty; a signal arrives in step `stop`."""

    def __init__(self, rank: int, world: int, stop: int = 0):
        super().__init__(
            [tiny.batch(rows=7, seed=i, ignored=0.4) for i in range(STEPS)], device_rows=3
        )
        self.rank, self.world, self.stop = rank, world, stop

    def __next__(self):
        whole = recut(super().__next__(), 1)
        if self.step == self.stop and self.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.world == 1:
            return recut([_join(whole)], self.device_rows)
        if self.step == 2:  # one rank has it all, the other a row that is all ignored
            mine = (
                whole
                if self.rank
                else [Batch(whole[0].inputs, torch.full_like(whole[0].targets, -1))]
            )
        else:
            mine = whole[self.rank :: self.world]
        return recut([_join(mine)], self.device_rows)


def _join(batches):
    return Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches]))


def train(
    directory: Path, rank: int, world: int, tied: bool, stop: int = 0, resume: bool = False
) -> None:
    """A run of STEPS steps, stopped in step `stop`, or resumed from what `directory` holds."""
    runtime = replace(tiny.CPU, rank=rank, world_size=world)
    m = tiny.randomise(tiny.model(tie_embeddings=tied))
    run = (tiny.resumed if resume else tiny.run)(
        directory,
        m,
        Share(rank, world, stop),
        runtime=runtime,
        optimizer=tiny.optimizer(m, runtime, weight_decay=0.01),
        schedule=SCHEDULE,
    )
    run.evaluations = [Evaluation("eval", 2, lambda: {"val_bpb": float(10 - run.step)}, start=True)]
    try:
        run.fit()
    except Interrupted:
        assert stop
    run.logbook.close()


def reinforce(directory: Path, rank: int, world: int) -> None:
    """STEPS steps on replies that each rank samples for its share of five questions per step."""
    runtime, m = replace(tiny.CPU, rank=rank, world_size=world), toy.policy(toy.words())
    feed = toy.feed(toy.words(), m, runtime=runtime, per_step=5, device_rows=3, total=5 * STEPS)
    optimizer = tiny.optimizer(m, runtime, lr_scale=0.1)
    tiny.fit(directory, m, feed, SCHEDULE, runtime=runtime, optimizer=optimizer)


def odd_updates(directory: Path, rank: int, world: int) -> None:
    """Steps on odd numbers of matrices and on tables whose rows do not divide; state reloaded."""
    g = torch.Generator().manual_seed(0)
    shapes = {f"{kind}{i}": s for kind in SHAPES for i, s in enumerate(SHAPES[kind])}
    params = {n: torch.nn.Parameter(torch.randn(s, generator=g)) for n, s in shapes.items()}

    def optimizer():
        named = {k: {n: p for n, p in params.items() if n.startswith(k)} for k in SHAPES}
        return MuonAdamW([Group(kind, named[kind], 0.05) for kind in SHAPES], torch.float32)

    o = optimizer()
    for step in range(4):
        for n, p in params.items():
            parts = torch.randn((2, *p.shape), generator=g)  # what two ranks would contribute
            p.grad = parts.sum(0) if world == 1 else parts[rank].clone()
            if n == "muon1" and step == 1:
                p.grad = None
        o.step(1 - step / 8, 0.9)
        if step == 1:
            state, steps = {k: t.clone() for k, t in o.state_tensors().items()}, o.steps
            o = optimizer()
            o.load_state_tensors(state, steps)
    sizes = {
        g.optimizer: [t.numel() for s in g.state.values() for t in s.values()] for g in o.groups
    }
    (directory / f"held_{rank}.json").write_text(json.dumps({k: sum(v) for k, v in sizes.items()}))
    tensors = {**{n: p.detach() for n, p in params.items()}, **o.state_tensors()}
    save_file(
        {k: t.contiguous() for k, t in tensors.items()},
        directory / f"odd_{world}_{rank}.safetensors",
    )


def whole_command(base: Path, rank: int) -> None:
    """
    base_train on two ranks that measure very different peaks, with a batch by rule and a budget of
    six seconds, of which every step takes one.
    """
    real, chosen = horizon.choose_horizon, []
    now, update = [0.0], MuonAdamW.step

    def step(optimizer, *rest):
        now[0] += 1
        return update(optimizer, *rest)

    MuonAdamW.step = step
    time.monotonic = lambda: now[0]  # opening takes no time
    stage.Run = partial(loop.Run, clock=time.monotonic)
    hardware.measured_peak = lambda *_: 1e9 * 1e5**rank
    horizon.choose_horizon = lambda *given: chosen.append(real(*given)) or chosen[-1]
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    base_train.main(
        [
            *json.loads((base / "flags.json").read_text()),
            "--total_batch_size=0",
            "--max_minutes=0.1",
            "--eval_every=0",
        ]
    )
    (base / f"horizon_{rank}.json").write_text(json.dumps([asdict(h) for h in chosen]))


def worker(rank: int, base: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    toy.policy_weights()  # trained before there are other ranks, whose gradients would be added
    meeting = f"file://{base / 'meeting'}"  # a port could be taken meanwhile
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    odd_updates(base, rank, 2)
    for tied in (False, True):
        train(base / f"two_{tied}", rank, 2, tied)
    train(base / "begun_by_two", rank, 2, False, stop=STOP)
    train(base / "begun_by_one", rank, 2, False, resume=True)
    reinforce(base / "two_rl", rank, 2)
    whole_command(base, rank)  # leaves the group


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """All that one rank and two ranks write, in one start of two processes."""
    base = tmp_path_factory.mktemp("ranks")
    for tied in (False, True):
        train(base / f"one_{tied}", 0, 1, tied)
    train(base / "begun_by_one", 0, 1, False, stop=STOP)
    odd_updates(base, 0, 1)
    reinforce(base / "one_rl", 0, 1)
    (base / "flags.json").write_text(json.dumps(tiny.workplace(base)))
    tiny.forkserver()
    mp.start_processes(worker, (base,), nprocs=2, start_method="forkserver")
    train(base / "begun_by_two", 0, 1, False, resume=True)
    return base


def assert_alike(run: Path, expected: Path) -> None:
    a, b = ([r["loss"] for r in logbook.read(d) if r["kind"] == "train"] for d in (run, expected))
    assert len(a) == STEPS and a == pytest.approx(b, rel=2e-5)
    a, b = checkpoint.newest(run), checkpoint.newest(expected)
    assert a.path.name == b.path.name == f"step_{STEPS:06d}" and a.meta["updates"] == STEPS
    for x, y in ((a.weights, b.weights), (a.optimizer_tensors, b.optimizer_tensors)):
        assert x.keys() == y.keys()
        for name in x:
            assert (x[name] - y[name]).norm() <= 5e-3 * y[name].norm() + 1e-6, name


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_are_one(base, tied):
    assert_alike(base / f"two_{tied}", base / f"one_{tied}")


def test_two_ranks_reinforce_as_one(base):
    """The same replies and rewards, and one update: the mean over the tokens of both ranks."""
    assert_alike(base / "two_rl", base / "one_rl")
    two, one = (
        [(r["reward"], r["zero_variance"], r["length"]) for r in tiny.rows(base / d)]
        for d in ("two_rl", "one_rl")
    )
    assert two == one and len({reward for reward, *_ in one}) > 1


def test_a_checkpoint_of_two_ranks_goes_on_on_one(base):
    assert_alike(base / "begun_by_two", base / "one_False")


def test_a_checkpoint_of_one_rank_goes_on_on_two(base):
    assert_alike(base / "begun_by_one", base / "one_False")


def test_odd_shapes(base):
    one, *two = (load_file(base / f"odd_{w}_{r}.safetensors") for w, r in ((1, 0), (2, 0), (2, 1)))
    for t in two:
        assert t.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(t[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(torch.equal(two[0][name], two[1][name]) for name in one), (
        "the ranks agree to the bit"
    )


def test_the_ranks_agree_on_the_horizon(base):
    first, second = ((base / f"horizon_{rank}.json").read_text() for rank in (0, 1))
    assert first == second
    meta = checkpoint.newest(base / "checkpoints" / "base" / "t").meta
    assert meta["done"] and meta["world_size"] == 2 and meta["step"] >= 1


def test_the_ranks_divide_the_state(base):
    """Each rank holds its share: the first has at most one matrix or row more of each shape."""
    held = [json.loads((base / f"held_{rank}.json").read_text()) for rank in (0, 1)]
    moments = {"muon": 1, "adamw": 2}
    for kind, shapes in SHAPES.items():
        total = moments[kind] * sum(math.prod(shape) for shape in shapes)
        assert held[0][kind] + held[1][kind] == total
        assert held[1][kind] >= 0.2 * total


# ---- a rank that ends

RANK_FLAGS = ["--num_iterations=60", "--eval_every=0", "--save_every=10", "--compile=off"]


def launch(base: Path, world: int, *flags: str, **options) -> subprocess.Popen:
    """base_train under torchrun, with the output of every rank in `base`/logs."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--redirects=3"),
        *(f"--nproc_per_node={world}", f"--log-dir={base / 'logs'}"),
        *("-m", "nanochat.commands.base_train"),
        *json.loads((base / "flags.json").read_text()),
        *RANK_FLAGS,
        *flags,
    ]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )


def rank_process(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and int(parent) == launcher.pid:
            return int(folder.name)
    raise ProcessLookupError(rank)


def words_of_ranks(base: Path) -> str:
    """What all ranks have printed on standard error."""
    return "\n".join(p.read_text() for p in sorted(base.glob("logs/*/*/*/stderr.log")))


def bits(base: Path) -> tuple:
    run = base / "checkpoints" / "base" / "t"
    stored = checkpoint.newest(run, optimizer=True)
    assert stored.meta["done"]
    losses = {r["step"]: r["loss"] for r in logbook.read(run) if r["kind"] == "train"}
    files = "model.safetensors", "optim.safetensors"
    return stored.step, losses, *(sha256_file(stored.path / file) for file in files)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(base folder, its bits) of a run of two and of four ranks that nobody disturbed."""
    expected = {}
    for world in (2, 4):
        base = tmp_path_factory.mktemp(f"world{world}")
        (base / "flags.json").write_text(json.dumps(tiny.workplace(base)))
        assert launch(base, world).wait(300) == 0, words_of_ranks(base)
        expected[world] = base, bits(base)
    return expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("world", "end", "says"),
    [
        (2, "kill rank 1", "error: another rank has ended"),
        (2, "kill rank 0", "error: rank 1: another rank has ended"),
        (4, "kill rank 2", "another rank has ended"),  # whichever notices first says so
        (4, "kill rank 0", "another rank has ended"),
        (2, "stop the launcher", "interrupted"),
        (4, "stop the launcher", "interrupted"),
        (2, "full disk", "error: cannot write the checkpoint"),
    ],
)
def test_a_rank_that_ends_ends_the_run_with_a_sentence(launched, tmp_path, world, end, says):
    """Within a minute, with one sentence of all ranks together, and resumed to the same bits."""
    other, expected = launched[world]
    for name in ("flags.json", "tokenizer"):
        (shutil.copytree if name == "tokenizer" else shutil.copy)(other / name, tmp_path / name)
    run = tmp_path / "checkpoints" / "base" / "t"
    limit = None
    if end == "full disk":  # the model fits, the optimizer's state does not
        size = checkpoint.newest(other / "checkpoints/base/t").path / "model.safetensors"
        limit = resource.RLIMIT_FSIZE, (size.stat().st_size + 2000, resource.RLIM_INFINITY)
    launcher = launch(
        tmp_path, world, preexec_fn=(lambda: resource.setrlimit(*limit)) if limit else None
    )
    while launcher.poll() is None and not limit:
        if max([0, *(r["step"] for r in logbook.read(run) if r["kind"] == "train")]) >= 15:
            break
        time.sleep(0.05)
    began = time.monotonic()
    if end.startswith("kill"):
        os.kill(rank_process(launcher, int(end[-1])), signal.SIGKILL)
    elif not limit:
        launcher.terminate()
    assert launcher.wait(120) != 0
    assert limit or time.monotonic() - began < 60
    printed = words_of_ranks(tmp_path)
    sentences = [x for x in printed.splitlines() if x.startswith("error:") or x == "interrupted"]
    assert len(sentences) == 1 and says in sentences[0], printed
    assert "Traceback" not in printed
    assert launch(tmp_path, world, "--resume=auto").wait(300) == 0, words_of_ranks(tmp_path)
    assert bits(tmp_path) == expected
