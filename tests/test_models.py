"""What is trained: one line per run, from metadata alone; damage is a reason; runs can be removed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook
from nanochat.commands import models
from nanochat.model import checkpoint, stages
from nanochat.model.runs import find_records

ROOT = Path(__file__).resolve().parent.parent


def put(base: Path, stage: str, tag: str, step: int = 3, **meta) -> Path:
    """A run with a checkpoint of tiny.model() and an evaluation; returns its folder."""
    folder, m = base / "checkpoints" / stage / tag, tiny.model()
    known = {"stage": stage, "tokens": 768, "seconds": 9.0, "done": True}
    known |= {"last": {"eval": {"val_bpb": 1.25}}}
    checkpoint.save(folder, step, m.state_dict(), {}, {**tiny.meta(m), **known, **meta})
    with Logbook(folder, config={}, step=0) as book:
        book.log(kind="chat_eval", step=step, stage=stage, accuracy=0.75, n=40)
    return folder


def test_every_run_is_a_row_with_its_figures(base, capsys):
    assert models.main([]) == [] and "quickstart" in capsys.readouterr().out
    put(base, "base", "d2", step=5)
    put(base, "base", "d2", step=20, tokens=5000, done=False)
    put(base, "rl", "d2.old", last={"eval": {"pass@1": 0.5}})
    (unfinished, aside) = models.main(["--json"])
    assert json.loads(capsys.readouterr().out)[0]["folder"] == str(base / "checkpoints/base/d2")
    assert (unfinished.name, unfinished.step, unfinished.tokens) == ("base/d2", 20, 5000)
    assert (unfinished.val_bpb, unfinished.accuracy, unfinished.questions) == (1.25, 0.75, 40)
    assert unfinished.parameters == tiny.model().counts()["total"] and not unfinished.problem
    files = [f for f in (base / "checkpoints/base/d2").rglob("*") if f.is_file()]
    assert unfinished.disk_bytes == sum(f.stat().st_size for f in files)
    assert (unfinished.state, aside.state, aside.pass_at_1) == ("unfinished", "set aside", 0.5)
    models.main([])
    line = next(li for li in capsys.readouterr().out.splitlines() if "base/d2" in li)
    assert "75.0% of 40" in line and "1.2500" in line and "default, unfinished" in line


def test_the_default_is_what_every_command_loads(base):
    for when, (stage, tag) in enumerate(
        [("base", "a"), ("rl", "b"), ("mid", "b"), ("sft", "c.old")]
    ):
        os.utime(put(base, stage, tag) / "step_000003", (when, when))
    records = find_records()
    assert [r.name for r in records if r.default] == ["rl/b"] and records[0].default
    assert checkpoint.choose()[0] == "rl" and records[-1].name == "sft/c.old"
    (base / "checkpoints/rl/b/step_000003/meta.json").write_text("{")
    assert [r.name for r in find_records() if r.default] == ["mid/b"]
    assert checkpoint.choose()[0] == "mid"


def test_an_older_checkpoint_counts_where_the_newest_is_damaged(base):
    folder = put(base, "sft", "d2", step=3)
    put(base, "sft", "d2", step=9, tokens=999)
    (folder / "step_000009" / "manifest.json").unlink()
    (record,) = find_records()
    assert (record.step, record.tokens, record.problem) == (3, 768, "")


def test_what_a_run_deletes_while_runs_are_listed_does_not_count(base, monkeypatch):
    folder, lstat = put(base, "sft", "d2"), os.lstat
    size = find_records()[0].disk_bytes

    def vanished(path, **rest):
        if Path(path).name == "optim.safetensors":
            raise FileNotFoundError
        return lstat(path, **rest)

    gone = lstat(folder / "step_000003/optim.safetensors").st_size
    monkeypatch.setattr(os, "lstat", vanished)
    monkeypatch.setattr(stages, "step_folders", lambda run: [run / "step_000003", run / "step_9"])
    (record,) = find_records()
    assert (record.step, record.problem) == (3, "") and record.disk_bytes == size - gone


def test_folders_that_are_no_runs_say_so(base, capsys):
    put(base, "base", "d2")
    for stranger in ("base/notes", "pictures/cat", "sft/a\x1b[2J b"):
        (base / "checkpoints" / stranger).mkdir(parents=True)
    (base / "checkpoints/base/README.txt").write_text("mine")
    (base / "checkpoints/base/link").symlink_to(base / "checkpoints/base/link")
    (base / "checkpoints/base/.d9.lock").touch()
    records = {r.name: r.problem for r in models.main([])}
    assert "\x1b" not in capsys.readouterr().out
    assert records == {
        "base/d2": "",
        "base/notes": "it holds no checkpoint",
        "sft/a\x1b[2J b": "it holds no checkpoint",
        "base/README.txt": "it is not a folder",
        "base/link": "it is not a folder",
        "pictures": "there is no such stage",
    }


# ---- removing


def test_a_run_is_removed_after_a_yes(base, monkeypatch, capsys):
    kept, gone = put(base, "sft", "d2"), put(base, "sft", "d2.old2")
    (record,) = [r for r in find_records() if r.tag == "d2.old2"]
    with pytest.raises(UserError, match="add --yes"):
        models.main(["--remove", "sft/d2.old2"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("", "no"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        models.main(["--remove", "sft/d2.old2"])
        assert gone.exists() and "nothing was deleted" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda question: "y")
    models.main(["--remove", "sft/d2.old2"])
    size = f"{record.disk_bytes / 1000:.3g}kB"
    assert not gone.exists() and kept.exists()
    assert f"deleted sft/d2.old2: freed {size}" in capsys.readouterr().out
    models.main(["--yes", "--remove", "sft/d2"])
    assert not (base / "checkpoints").exists()  # nothing is left behind, no lock either


def test_what_is_no_run_or_not_known_is_refused(base, tmp_path_factory):
    folder, elsewhere = put(base, "sft", "d2"), tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(UserError, match=r"no run 'sft/d3' \(did you mean sft/d2\?\)"):
        models.main(["--yes", "--remove", "sft/d2", "sft/d3"])
    for name in ("sft/../sft/d2", "sft", "d2", str(folder), "../elsewhere"):
        with pytest.raises(UserError, match="there is no run"):
            models.main(["--yes", "--remove", name])
    (base / "checkpoints/sft/link").symlink_to(put(elsewhere, "sft", "far"))
    with pytest.raises(UserError, match="not the folder of a run"):
        models.main(["--yes", "--remove", "sft/link"])
    for stranger in ("notes.txt", "step_000003/notes.txt"):
        (folder / stranger).write_text("mine")
        with pytest.raises(UserError, match=rf"holds {stranger}, which no run writes"):
            models.main(["--yes", "--remove", "sft/d2"])
        (folder / stranger).unlink()
    assert (elsewhere / "checkpoints/sft/far/step_000003/model.safetensors").exists()
    assert (folder / "step_000003/model.safetensors").exists()


HOLD = "import time; from nanochat.train.run import reserve_run; reserve_run('sft', 'd2'); print('held', flush=True); time.sleep(60)"


def test_a_run_that_is_being_trained_stays(base):
    folder = put(base, "sft", "d2", done=False)
    process, said = tiny.start_program(HOLD, base, NANOCHAT_BASE_DIR=str(base)), base / "stdout"
    try:
        tiny.wait_until(lambda: said.exists() and said.read_text() == "held\n", 120)
        assert [r.state for r in find_records()] == ["training"]
        with pytest.raises(UserError, match=f"sft/d2 is in use by process {process.pid}"):
            models.main(["--yes", "--remove", "sft/d2"])
    finally:
        process.kill()
        process.join(60)
    assert folder.exists()
    assert [r.state for r in find_records()] == ["unfinished"]  # a dead one's lock is no obstacle
    models.main(["--yes", "--remove", "sft/d2"])
    assert not folder.exists()


def test_an_interrupted_removal_can_be_repeated(base, monkeypatch):
    folder = put(base, "sft", "d2")
    rmtree = shutil.rmtree

    def interrupted(path):
        rmtree(path / "step_000003")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.main(["--yes", "--remove", "sft/d2"])
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert [r.problem for r in find_records()] == ["it holds no checkpoint"]
    models.main(["--yes", "--remove", "sft/d2"])
    assert not folder.exists()


def test_listing_needs_no_torch(base):
    put(base, "sft", "d2")
    code = "import sys; sys.modules['torch'] = None; from nanochat.commands import models; models.main(['--json'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["default"] is True
