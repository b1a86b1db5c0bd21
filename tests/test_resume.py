"""
Resuming: a run that was stopped, killed or damaged ends with the bits of one that was not; changes
must be asked for.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from nanochat.base import hardware, logbook
from nanochat.base.common import UserError, entry
from nanochat.base.files import reserve, sha256_file
from nanochat.commands import base_train, chat_sft, mid_train
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks import mixture
from nanochat.model import checkpoint
from nanochat.train import resume

STEPS = ["--num_iterations=20", "--eval_every=8", "--save_every=3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(base folder, flags, run folder) of 20 steps without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("base")
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        flags = tiny.workplace(base)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes below: sums in one order
        base_train.main([*flags, *STEPS])
        yield base, flags, base / "checkpoints" / "base" / "t"
        torch.set_num_threads(threads)


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """The same tokenizer and text in a folder of its own, before any training."""
    base, flags, _ = whole
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.base.hardware.measured_peak", lambda *_: 1e11)  # takes seconds
    return flags, tmp_path / "checkpoints" / "base" / "t"


def losses(directory: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in logbook.read(directory) if r["kind"] == "train"}


def assert_same_end(run: Path, expected: Path) -> None:
    a, b = checkpoint.newest(run), checkpoint.newest(expected)
    assert a.path.name == b.path.name == "step_000020"
    assert losses(run) == losses(expected) and len(losses(run)) == 20
    for file in ("model.safetensors", "optim.safetensors"):
        assert sha256_file(a.path / file) == sha256_file(b.path / file), file
    assert a.meta["done"] and a.meta["best"] == b.meta["best"]


def interrupted(monkeypatch, flags: list[str], step: int = 10) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        base_train.main([*flags, *STEPS])


def test_ten_and_ten_are_twenty(whole, place, monkeypatch):
    flags, run = place
    interrupted(monkeypatch, flags)
    assert checkpoint.newest(run).path.name == "step_000010" and len(losses(run)) == 10
    base_train.main([*flags, "--resume=auto"])  # the rest of the knobs is the run's own
    assert_same_end(run, whole[2])


def test_going_on_past_a_damaged_checkpoint(whole, place, monkeypatch, capsys):
    flags, run = place
    interrupted(monkeypatch, flags, 14)
    newest = checkpoint.newest(run)
    os.truncate(newest.path / "optim.safetensors", 1000)
    base_train.main([*flags, "--resume=auto"])
    errors = capsys.readouterr().err
    assert f"skipping the damaged checkpoint {newest}" in errors
    assert f"{newest} is now damaged_step_000014" in errors
    assert_same_end(run, whole[2])


def test_a_crash_without_warning(whole, place, monkeypatch):
    """What was computed after the last save is computed again, and the record shows it once."""
    flags, run = place

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        tiny.act_in_step(patch, 12, crash)
        base_train.main([*flags, *STEPS])
    assert checkpoint.newest(run).path.name == "step_000009" and len(losses(run)) == 11
    base_train.main([*flags, "--resume=auto"])
    assert_same_end(run, whole[2])


def train_in_process(flags: list[str], base: Path, output: Path, end=None) -> None:
    """
    The body of a process that trains, with all that it prints in a file. `end`: in which step it
    gets which signal (0: while it opens the run), after how many seconds; with a delay it does not
    come past step 12.
    """
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    hardware.measured_peak = lambda *_: 1e11  # as in place
    torch.set_num_threads(1)
    if end:
        step, number, delay = end
        patch, kill = pytest.MonkeyPatch(), partial(os.kill, os.getpid(), number)
        act = threading.Timer(delay, kill).start if delay else kill
        if step:
            tiny.act_in_step(patch, step, act)
        else:
            act()
        if delay:
            tiny.act_in_step(patch, 12, lambda: time.sleep(600))
    entry(lambda: base_train.main(flags))


@pytest.mark.parametrize(("step", "delay"), [(0, 0.05), (0, 0.2), (1, 0.02), (5, 0.003)])
def test_killed_at_any_moment(whole, place, tmp_path, step, delay):
    """kill -9 before the first step, in a step or soon after it; SIGTERM later; and to the end."""
    flags, run = place
    output = tmp_path / "output"

    def end(*how) -> int | None:
        arguments = [*flags, *STEPS, "--resume=auto"], tmp_path, output, how
        process = tiny.forkserver().Process(target=train_in_process, args=arguments)
        process.start()
        process.join(600)
        return process.exitcode

    assert end(step, signal.SIGKILL, delay) == -signal.SIGKILL
    assert not run.exists() or len(losses(run)) < 12
    if step == 5:
        assert end(14, signal.SIGTERM, 0) == 130, output.read_text()
        printed = output.read_text()
        assert "Traceback" not in printed and "continue with --resume auto" in printed
        assert checkpoint.newest(run).step == 14
    assert end() == 0, output.read_text()
    assert_same_end(run, whole[2])


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (mid_train, ["--total_batch_size=1024"]),
        (chat_sft, ["--conversations_per_step=16", "--source=base"]),
    ],
    ids=["mid", "sft"],
)
def test_later_stages_go_on_too(whole, place, monkeypatch, script, flags):
    base, own = place[1].parent.parent.parent, ["--data=tinyworld@400", "--eval_every=3"]
    shutil.copytree(whole[2], place[1])
    monkeypatch.setitem(mixture.COUNTS, "tinyworld", (400, 40))
    name = script.__name__.split("_")[-1].replace("train", "mid")
    run = base / "checkpoints" / name / "t"

    script.main([*flags, *own, "--num_iterations=8"])
    expected, was = checkpoint.newest(run), losses(run)
    kept = shutil.copytree(expected.path, base / "kept")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        script.main([*flags, *own, "--num_iterations=8"])
    assert checkpoint.newest(run).path.name == "step_000004"
    script.main(["--model_tag=t", "--resume=auto"])  # the rest is as it was
    assert losses(run) == was and len(was) == 8
    for file in ("model.safetensors", "optim.safetensors"):
        assert sha256_file(checkpoint.newest(run).path / file) == sha256_file(kept / file)


def test_a_later_stage_keeps_its_own_settings(whole, place, monkeypatch):
    """Those that differ from the parent's, without the flags."""
    shutil.copytree(whole[2], place[1])
    monkeypatch.setitem(mixture.COUNTS, "tinyworld", (400, 40))
    own = ["--data=tinyworld@400", "--num_iterations=6", "--eval_every=0"]
    given = ["--lr_scale=0.5", "--device_batch_size=4", "--name=Otto", "--seed=7"]
    run = place[1].parents[1] / "mid" / "t"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        mid_train.main([*own, *given])
    before = checkpoint.newest(run).meta
    mid_train.main(["--resume=auto"])
    after = checkpoint.newest(run).meta
    assert after["step"] == 6 and {**after["knobs"], "resume": ""} == before["knobs"]
    assert {**after["origins"], "resume": "default"} == before["origins"]
    chosen = [after["knobs"][n] for n in ("lr_scale", "device_batch_size", "name", "seed")]
    assert chosen == [0.5, 4, "Otto", 7]


def test_a_stage_goes_on_from_the_parent_that_it_had(whole, place, monkeypatch):
    """Without the flag that chose it."""
    shutil.copytree(whole[2], place[1])
    monkeypatch.setitem(mixture.COUNTS, "tinyworld", (400, 40))
    own = ["--source=base", "--data=tinyworld@400", "--num_iterations=4", "--eval_every=0"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        chat_sft.main([*own, "--conversations_per_step=16"])
    chat_sft.main(["--resume=auto"])
    assert checkpoint.locate("sft", "t").meta["step"] == 4


# ---- what may and may not change


def test_a_finished_run_has_nothing_to_do(whole, monkeypatch, capsys):
    _, flags, run = whole
    before = losses(run)
    summary = base_train.main([*flags, "--resume=auto"])
    assert "nothing to do" in capsys.readouterr().out
    assert summary["eval"] == checkpoint.newest(run).meta["last"]["eval"]
    assert losses(run) == before


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            "--num_iterations=40",
            r"started with num_iterations=20, not 40.*--new_horizon",
        ),
        ("--max_minutes=3", r"started with max_minutes=0, not 3"),
        (
            "--total_batch_size=512",
            r"started with total_batch_size=1024, not 512",
        ),
        ("--softcap=0", r"has softcap=15.0, not 0.0: leave the flag out to continue"),
        ("--activation=gelu", r"has activation=relu2, not gelu"),
        ("--depth=3", r"has n_layer=2, not 3"),
        ("--document_attention", r"has document_start=-1, not \d+"),
        ("--copy_heads=1", r"has copy_heads=0, not 1"),
        ("--seed=7", r"the seed of the data changed from 42 to 7"),
    ],
)
def test_a_change_that_would_go_unnoticed_is_refused(whole, place, monkeypatch, flag, says):
    _, run = place
    shutil.copytree(whole[2], run)
    newest = checkpoint.newest(run)
    newest.amend({**newest.meta, "done": False})
    before = sha256_file(newest.path / "meta.json")
    with pytest.raises(UserError, match=says):
        base_train.main([*place[0], "--resume=auto", flag])
    assert sha256_file(newest.path / "meta.json") == before and not newest.damage(optimizer=True)


@pytest.mark.parametrize("change", ["order", "words", "a letter"])
def test_other_text_of_the_same_counts_is_refused(whole, place, change):
    """As many documents and tokens as before, so that only the content tells."""
    flags, run = place
    shutil.copytree(whole[2], run)
    newest = checkpoint.newest(run)
    newest.amend({**newest.meta, "done": False})
    lines = (whole[0] / "text.jsonl").read_text().splitlines()
    if change == "order":
        lines = lines[::-1]
    elif change == "words":
        lines = [
            line.replace("cat", "\0").replace("dog", "cat").replace("\0", "dog") for line in lines
        ]
    else:
        lines[300] = lines[300].replace("The", "Ehe", 1)
    text = whole[0].parent / f"{change.split()[-1]}.jsonl"
    text.write_text("\n".join(lines))
    flags = [f"--data=own={text}", *(f for f in flags if not f.startswith("--data"))]
    with pytest.raises(UserError, match="cannot resume, because "):
        base_train.main([*flags, "--resume=auto"])
    assert checkpoint.newest(run) == newest


def rate_at(progress):
    """The factor on the rates while they fall, with base_train's defaults."""
    return 0.05 + 0.95 * (1 - progress) / 0.65


def test_a_longer_horizon_when_asked_for(whole, place, capsys):
    _, run = place
    shutil.copytree(whole[2], run)
    base_train.main([*place[0], "--resume=auto", "--num_iterations=30", "--new_horizon=stretch"])
    assert checkpoint.newest(run).path.name == "step_000030"
    trained = [r for r in logbook.read(run) if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(1, 31))
    assert trained[20]["lr_mult"] == pytest.approx(rate_at(20 / 30)), (
        "the schedule is laid over the new length"
    )
    assert (
        "learning rate x0.050 at step 20, x0.537 from here on (66.7% of the run is done)"
        in capsys.readouterr().out
    )


def test_a_longer_horizon_without_a_jump(whole, place, monkeypatch, capsys):
    """redecay: from the current rate straight to the floor, also after another stop."""
    flags, run = place
    interrupted(monkeypatch, flags, 14)
    longer = [*flags, "--resume=auto", "--num_iterations=34"]
    with pytest.raises(
        UserError,
        match=r"started with num_iterations=20, .* --new_horizon=stretch .*--new_horizon=redecay",
    ):
        base_train.main(longer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
        base_train.main([*longer, "--new_horizon=redecay"])
    assert "learning rate x0.488 at step 14, x0.488 from here on" in capsys.readouterr().out
    base_train.main([*flags, "--resume=auto"])
    assert "learning rate" not in capsys.readouterr().out
    mults = [r["lr_mult"] for r in logbook.read(run) if r["kind"] == "train"]
    begin = rate_at(14 / 20)
    assert mults[14:] == pytest.approx([begin - (begin - 0.05) * i / 20 for i in range(20)])
    assert checkpoint.newest(run).meta["done"] and len(mults) == 34


def test_new_horizons_that_leave_nothing_to_do(whole, place, monkeypatch, capsys):
    flags, run = place
    shutil.copytree(whole[2], run)
    again = [*flags, "--resume=auto"]
    with pytest.raises(
        UserError,
        match=r"at its floor \(x0.05\), so redecay cannot lower it: use --new_horizon=stretch",
    ):
        base_train.main([*again, "--num_iterations=30", "--new_horizon=redecay"])
    with pytest.raises(UserError, match="--new_horizon needs a value: one of '', stretch, redecay"):
        base_train.main([*again, "--new_horizon"])
    base_train.main([*again, "--num_iterations=20", "--new_horizon=stretch"])
    assert "nothing to do" in capsys.readouterr().out
    shutil.rmtree(run)
    interrupted(monkeypatch, flags, 10)
    with pytest.raises(UserError, match=r"already at or past the new end \(10 steps"):
        base_train.main([*again, "--num_iterations=9", "--new_horizon=stretch"])


def test_a_rate_that_jumps_is_said(place, monkeypatch, capsys):
    flags, _ = place
    interrupted(monkeypatch, flags, 14)
    base_train.main([*flags, "--resume=auto", "--warmdown_ratio=0.5"])
    assert "learning rate x0.488 at step 14, x0.620 from here on" in capsys.readouterr().out


def test_one_budget_in_two_units():
    hours, minutes = (
        {"max_minutes": 0.0, "max_hours": 1.5},
        {"max_minutes": 90.0, "max_hours": 0.0},
    )
    resume.same_horizons(hours, minutes)
    with pytest.raises(UserError, match="started with max_minutes=90, not 91"):
        resume.same_horizons(hours, {**minutes, "max_minutes": 91.0})


def test_another_tokenizer(whole, place):
    flags, run = place
    shutil.copytree(whole[2], run)
    Tokenizer.train(["entirely different words here"] * 9, 280).save(
        run.parent.parent.parent / "tokenizer"
    )
    with pytest.raises(
        UserError,
        match=r"was trained with tokenizer \w{12}, but the one in .* is \w{12}: restore that tokenizer",
    ):
        base_train.main([*flags, "--resume=auto", "--num_iterations=20"])


def test_a_new_run_sets_the_old_one_aside_only_when_it_begins(whole, place, capsys):
    flags, run = place
    shutil.copytree(whole[2], run)
    for wrong in ("--total_batch_size=500", "--model_dim=33", "--target_flops=1e9"):
        with pytest.raises(UserError):
            base_train.main([*flags, *STEPS, wrong])
        assert checkpoint.newest(run).path.name == "step_000020"
    for steps in (2, 3, 4):  # slips of the hand: no run is ever deleted
        base_train.main([*flags, f"--num_iterations={steps}", "--eval_every=0"])
        assert "the earlier run is now" in capsys.readouterr().err
    kept = {p.name: checkpoint.newest(p).step for p in run.parent.iterdir() if p.is_dir()}
    assert kept == {"t": 4, "t.old": 20, "t.old2": 2, "t.old3": 3}
    assert checkpoint.locate("base").path.parent == run


@pytest.mark.parametrize(
    "command",
    [(base_train, []), (base_train, ["--resume=auto"]), (chat_sft, ["--source=base"])],
    ids=["base", "resumed", "sft"],
)
def test_a_run_in_use_is_left_alone(whole, place, command):
    """The second start says who holds the run, before it renames or writes anything."""
    own, run = place
    main, flags = command
    shutil.copytree(whole[2], run)
    lock = run.parents[1] / ("sft" if main is chat_sft else "base") / ".t.lock"
    process = tiny.forkserver().Process(target=hold, args=(lock,))
    process.start()
    tiny.wait_until(lambda: lock.exists() and lock.read_text(), 600)
    before = sorted(run.parents[1].rglob("*"))
    flags = [*flags, *(own if main is base_train else ["--data=tinyworld@100"])]
    with pytest.raises(UserError, match=rf"the run t in .* is in use by process {process.pid} on"):
        main.main([*flags, *STEPS[:1]])
    assert sorted(run.parents[1].rglob("*")) == before
    process.kill()
    process.join(60)
    if main is base_train and "--resume=auto" in flags:
        main.main([*flags, *STEPS])  # the dead one is no obstacle


def hold(lock: Path) -> None:
    reserve(lock, "the run t")
    time.sleep(600)


class NoLogin(types.ModuleType):
    """A tracker that is installed but does not start."""

    def init(self, **_):
        raise PermissionError("not logged in")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--run=a", "--sinks=trackio"], "trackio is not installed"),
        (["--run=a"], "wandb cannot start .not logged in"),
        (["--sinks=wandbb"], "--sinks cannot be 'wandbb'"),
        (["--data=own=nowhere.jsonl"], "does not exist"),
        (["--keep=2"], "a checkpoint of this run needs .*has only 1kB free: free some space"),
    ],
    ids=["tracker missing", "tracker fails", "tracker unknown", "no data", "no space"],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_a_refused_start_changes_nothing(whole, place, monkeypatch, flags, says, earlier):
    """Neither an earlier run nor an empty place, whatever refuses and however late."""
    own, run = place
    monkeypatch.setitem(sys.modules, "wandb", NoLogin("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    if "--keep=2" in flags:
        usage = shutil.disk_usage(run.anchor)._replace(free=1000)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    if earlier:
        for name in ("t", "t.old"):
            shutil.copytree(whole[2], run.with_name(name))

    def state():
        files = (p for p in run.parent.rglob("*") if p.is_file() and p.suffix != ".lock")
        return {p: p.stat().st_mtime_ns for p in files}

    before = state()
    with pytest.raises(UserError, match=says):
        base_train.main([*own, *STEPS, *flags])
    assert state() == before and run.exists() == earlier


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "meta.json"])
def test_nothing_to_resume_from_is_no_new_run(whole, place, file):
    """Where every checkpoint is damaged, --resume=auto refuses; without it the run is kept."""
    flags, run = place
    shutil.copytree(whole[2], run)
    for stored in checkpoint.list_checkpoints(run):
        os.truncate(stored.path / file, 10)
    before = sorted(run.parent.rglob("*.json"))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact \(\d damaged\); restore"):
        base_train.main([*flags, *STEPS, "--resume=auto"])
    assert sorted(run.parent.rglob("*.json")) == before
    base_train.main([*flags, "--num_iterations=1", "--eval_every=0"])
    assert len(checkpoint.list_checkpoints(run.with_name("t.old"))) > 1


def test_the_metadata_says_how_the_run_came_about(whole):
    meta = json.loads((checkpoint.newest(whole[2]).path / "meta.json").read_text())
    assert (
        meta["knobs"]["depth"] == 2
        and meta["origins"]["depth"] == "command line"
        and meta["origins"]["softcap"] == "default"
    )
    assert (meta["horizon"]["rows"], meta["horizon"]["steps"], meta["updates"], meta["tokens"]) == (
        32,
        20,
        20,
        20 * 1024,
    )
