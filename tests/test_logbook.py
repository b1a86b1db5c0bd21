"""logbook: rows survive a kill, a restart supersedes rows, a failing tracker never stops a run."""

import io
import json
import math
import resource
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook, add, newest, read


def test_rows_come_back(tmp_path):
    with Logbook(tmp_path / "run", config={"depth": 4, "path": tmp_path}, step=0) as book:
        book.log(
            step=1,
            loss=torch.tensor(2.5),
            lr_mult=np.float32(0.5),
            tokens=np.int64(7),
            note="Größe",
        )
        book.log(
            step=1,
            kind="eval",
            val_bpb=1.25,
            kinds={"sums": {"accuracy": 0.5, "n": 10}},
            lines=["a", "b"],
        )
    start, train, evaluation = read(tmp_path / "run")
    assert start["kind"] == "start" and start["config"] == {"depth": 4, "path": str(tmp_path)}
    assert train == {
        "kind": "train",
        "step": 1,
        "loss": 2.5,
        "lr_mult": 0.5,
        "tokens": 7,
        "note": "Größe",
    }
    assert evaluation["kinds"]["sums"]["n"] == 10 and evaluation["lines"] == ["a", "b"]


def test_numbers_that_json_cannot_hold(tmp_path):
    with Logbook(tmp_path) as book:
        book.log(
            step=1, loss=float("nan"), norm=torch.tensor(float("inf")), low=-math.inf, missing=None
        )
    raw = (tmp_path / "metrics.jsonl").read_text()
    assert (
        json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["loss"]
        is None
    )
    (row,) = read(tmp_path)
    assert (
        math.isnan(row["loss"])
        and row["norm"] == math.inf
        and row["low"] == -math.inf
        and row["missing"] is None
    )


def test_a_restart_supersedes_what_came_after(tmp_path):
    with Logbook(tmp_path, step=0) as book:
        for step in range(1, 8):
            book.log(step=step, loss=1.0)
        book.log(step=5, kind="eval", val_bpb=1.0)
    with Logbook(tmp_path, step=4) as book:
        for step in (5, 6):
            book.log(step=step, loss=2.0)
    with Logbook(tmp_path) as book:  # an evaluation supersedes only itself
        book.log(step=6, kind="chat_eval", stage="sft", accuracy=0.1)
        book.log(step=6, kind="chat_eval", stage="mid", accuracy=0.3)
        book.log(step=6, kind="chat_eval", stage="sft", accuracy=0.2)
    rows = [r for r in read(tmp_path) if r["kind"] != "start"]
    assert [(r["step"], r["loss"]) for r in rows if r["kind"] == "train"] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
    ]
    assert [(r["stage"], r["accuracy"]) for r in rows if r["kind"] == "chat_eval"] == [
        ("mid", 0.3),
        ("sft", 0.2),
    ]
    assert not any(r["kind"] == "eval" for r in rows)
    Logbook(tmp_path, step=0).close()  # a new run: no row of the old one counts
    assert [r["kind"] for r in read(tmp_path)] == ["start"]


def test_a_torn_last_line_is_ignored_and_removed_on_reopening(tmp_path):
    with Logbook(tmp_path) as book:
        book.log(step=1, loss=1.0)
        book.log(step=2, loss=2.0)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        want = [1, 2][: whole[:cut].count(b"\n")]  # a row that lacks its newline is still read
        assert [r["step"] for r in read(tmp_path)] in (want, [1, 2][: len(want) + 1])
        with Logbook(tmp_path) as book:
            book.log(step=9, loss=9.0)
        assert [r["step"] for r in read(tmp_path)] == [*want, 9], cut
        assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_row_that_another_process_appends_as_the_file_is_opened_stays(tmp_path, monkeypatch):
    with Logbook(tmp_path) as book:
        book.log(step=1, loss=1.0)

    class Racing(io.FileIO):
        def read(self, *size):
            before = super().read(*size)
            with open(self.name, "ab") as other:
                other.write(b'{"kind": "eval", "step": 1}\n')
            return before

    monkeypatch.setattr(logbook, "open", lambda path, *_, **__: Racing(path, "a+"), raising=False)
    with Logbook(tmp_path) as book:
        book.log(step=2, loss=1.0)
    assert [row["kind"] for row in read(tmp_path)] == ["train", "eval", "train"]


def test_names_that_are_not_utf8_come_back(tmp_path):
    names = ["caf\udce9.txt", "café 🙂"]
    Logbook(tmp_path, config={"data": names}, step=0).close()
    assert read(tmp_path)[0]["config"]["data"] == names
    assert "café 🙂" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_rows_survive_kill_9(tmp_path):
    code = (
        "import sys, itertools; from nanochat.base.logbook import Logbook; book = Logbook(sys.argv[1])\n"
        "for i in itertools.count(1): book.log(step=i, loss=1.0); print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(20)]
    time.sleep(0.01)
    process.kill()
    seen += [int(x) for x in process.stdout.read().splitlines() if x]
    assert len(read(tmp_path)) >= len(seen) >= 20


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Logbook(tmp_path / "run", config={}, sinks=["wandb"], run_name="x") as book:
        book.log(step=1, loss=1.0)
    assert not (tmp_path / "run").exists() and read(tmp_path / "run") == []


class FakeWandb(types.ModuleType):
    def __init__(self, fail_at=None, name="wandb"):
        super().__init__(name)
        self.sent, self.fail_at, self.finished = [], fail_at, False

    def init(self, **kwargs):
        self.kwargs = kwargs
        return self

    def log(self, numbers, step):
        if step == self.fail_at:
            raise ConnectionError("gone")
        self.sent.append((step, numbers))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    with Logbook(tmp_path, sinks=["wandb"], run_name="first", config={"depth": 4}) as book:
        book.log(step=3, kind="eval", val_bpb=1.5, note="text", kinds={"sums": {"n": 2}})
    assert fake.sent == [(3, {"eval/val_bpb": 1.5, "eval/kinds/sums/n": 2})]
    assert (
        fake.kwargs["name"] == "first" and fake.kwargs["config"] == {"depth": 4} and fake.finished
    )


def test_trackio_gets_the_same_numbers_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", fake := FakeWandb(name="trackio"))
    with Logbook(tmp_path, sinks=["trackio"], run_name="first", config={"depth": 4}) as book:
        book.log(step=3, loss=2.5)
    assert fake.sent == [(3, {"train/loss": 2.5})] and fake.finished
    assert fake.kwargs == {"project": "nanochat", "name": "first", "config": {"depth": 4}}


class FakeTensorboard(types.ModuleType):
    """torch.utils.tensorboard, where one need not install its package."""

    def __init__(self):
        super().__init__("torch.utils.tensorboard")
        self.calls = []

    def SummaryWriter(self, folder):
        self.calls.append(("open", folder))
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given: self.calls.append((name, *given))


def test_tensorboard_gets_the_settings_and_every_number_as_it_comes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake := FakeTensorboard())
    config = {"depth": 4, "path": tmp_path}
    with Logbook(tmp_path, sinks=["tensorboard"], run_name="first", config=config) as book:
        book.log(step=3, loss=torch.tensor(2.5), lr_mult=math.nan, note="text")
        book.log(step=3, kind="eval", val_bpb=1.5, kinds={"sums": {"n": 2}})
        assert fake.calls[-1] == ("flush",), "so that a page shows it during the run"
    (opened, folder), (text, name, settings), *rest = fake.calls
    assert (opened, folder) == ("open", str(tmp_path / "tensorboard"))
    assert (text, name) == ("add_text", "config")
    stored = json.loads(settings.removeprefix("```\n").removesuffix("\n```"))
    assert stored == {"depth": 4, "path": str(tmp_path)}
    assert rest == [
        ("add_scalar", "train/loss", 2.5, 3),
        ("flush",),
        ("add_scalar", "eval/val_bpb", 1.5, 3),
        ("add_scalar", "eval/kinds/sums/n", 2, 3),
        ("flush",),
        ("close",),
    ]
    assert [row["kind"] for row in read(tmp_path)] == ["start", "train", "eval"]


def test_a_tracker_that_is_named_for_an_unnamed_run_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake := FakeTensorboard())
    with Logbook(tmp_path, sinks=["tensorboard"]) as book:
        book.log(step=1, loss=1.0)
    assert fake.calls == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match="tensorboard is not installed: run pip install tensorboard"
    ):
        Logbook(tmp_path, sinks=["tensorboard"], run_name="first")


def test_a_failing_tracker_is_reported_once_and_training_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail_at=2))
    with Logbook(tmp_path, sinks=["wandb"], run_name="first") as book:
        for step in (1, 2, 3, 4):
            book.log(step=step, loss=1.0)
    assert len(read(tmp_path)) == 4
    assert capsys.readouterr().err.count("wandb failed") == 1


@pytest.mark.parametrize("room", [0, 1, 30, 45])
def test_a_full_disk_is_reported_once_and_training_continues(tmp_path, capsys, room):
    """Full before a row or within one, for a while or until the end; a row is 42 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    book = Logbook(tmp_path)
    book.log(step=1, loss=1.0)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, hard))  # stands for a full disk
    try:
        for step in (2, 3, 4):
            book.log(step=step, loss=1.0)
        if room == 1:  # full until the end
            book.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("rows are lost; free some space") == 1
    if room != 1:
        book.log(step=5, loss=1.0)
        book.close()
    assert [row["step"] for row in read(tmp_path)] == [1, *[2] * (room == 45), *[5] * (room != 1)]


@pytest.mark.parametrize("deleted", ["the file", "the folder", "the base folder"])
def test_a_logbook_that_is_deleted_is_written_anew(tmp_path, capsys, deleted):
    folder = tmp_path / "base" / "run"
    book = Logbook(folder, config={"depth": 4}, step=0)
    book.log(step=1, loss=1.0)
    if deleted == "the file":
        (folder / "metrics.jsonl").unlink()
    else:
        shutil.rmtree(folder if deleted == "the folder" else folder.parent)
    book.log(step=2, loss=1.0)
    book.close()
    assert "metrics.jsonl was deleted: it is written anew" in capsys.readouterr().err
    assert [row["kind"] for row in read(folder)] == ["start", "train"]


def test_trackers_that_do_not_exist_or_are_not_installed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--sinks cannot be 'wandbb'"):
        Logbook(tmp_path, sinks=["wandbb"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        Logbook(tmp_path, sinks=["trackio"], run_name="real")
    monkeypatch.setitem(sys.modules, "wandb", None)
    Logbook(tmp_path, sinks=["wandb"]).close()  # an unnamed run does not use wandb
    with pytest.raises(UserError, match="pip install wandb"):
        Logbook(tmp_path, sinks=["wandb"], run_name="real")


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", None),
        ('{"kind": "train", "step": 1}\n{"kind": "train", "st', 1),
        ('{"kind": "train", "step": 1}\n{"kind": "eval", "step": 2}\n', 1),
        ("x" * 20000 + '\n{"kind": "train", "step": 7}\n', 7),
    ],
)
def test_the_last_step_of_metrics_that_are_being_written(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert newest(tmp_path, "train").get("step") == step
    assert newest(tmp_path / "missing", "train") == {}


def test_a_result_that_cannot_be_stored_is_a_notice(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    add(tmp_path, 3, "chat_eval", accuracy=0.5)
    assert "the result of chat_eval was not stored: cannot write" in capsys.readouterr().err
