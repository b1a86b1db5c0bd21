"""The quickstart command: its plan, its whole chain at toy size, continuing and training further."""

import errno
import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook
from nanochat.commands import base_train, mid_train, quickstart, tok_train
from nanochat.commands.quickstart import LESSONS, QuickstartKnobs
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.checkpoint import locate
from nanochat.model.stages import run_directory
from nanochat.train import chain

TOY = {
    "base": "--data tinyworld@0.2 --depth=1 --model_dim=32 --head_dim=16 --sequence_len=64 "
    "--total_batch_size=256 --copy_heads=1 --convolutions",
    "mid": "--data tinyworld@60 --text tinyworld@0.2",
    "sft": "--data tinyworld@30 --conversations_per_step=4",
    "rl": "--tasks tinyworld/twostep --questions_per_step=2 --samples=2 --eval_items=2 --max_tokens=24",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Toy lessons of three steps, on a machine that is said to be fast enough for them."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for stage, flags in TOY.items():
        looks = " --eval_tokens=1000 --eval_every=0 --sample_every=0"  # at the end
        flags += "" if stage == "rl" else looks
        work = 9 if stage == "mid" else 1
        monkeypatch.setitem(
            LESSONS, stage, LESSONS[stage]._replace(steps=3, step_tokens=work, flags=flags)
        )
    monkeypatch.setattr(quickstart, "TOKENIZER", "--data tinyworld@0.2 --vocab_size=400")
    monkeypatch.setattr(quickstart, "QUESTIONS", 16)
    monkeypatch.setattr(quickstart, "speed_here", lambda knobs: (1e6, 1e12))
    return tmp_path


CPU = ["--device_type=cpu", "--dtype=float32"]


@pytest.mark.usefixtures("offline")
def test_the_whole_chain_is_continued_after_an_interruption(toy, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(mid_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quickstart.main(CPU)
    first = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert first["done"] == ["tokenizer", "base"]
    base = locate("base").path

    summary = quickstart.main(CPU)
    after = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert after["lengths"] == first["lengths"] and after["seconds"] > first["seconds"]
    assert after["done"] == ["tokenizer", "base", "mid", "sft", "rl", "questions"]
    assert locate("base").path == base and locate("rl").step == 3
    assert summary["n"] == 16
    shown = capsys.readouterr().out
    assert f"It answers {summary['accuracy']:.1%} of 16 questions" in shown
    assert "below the target of 90%" in shown and "nanochat quickstart --minutes" in shown
    assert shown.count("    > ") == 9  # three questions after each of three stages
    assert "knobs" not in shown, "what the stages print belongs to the log file"
    assert "done: 3 steps" in (toy / "quickstart" / "quickstart.log").read_text()

    assert quickstart.main([])["n"] == 16, "nothing is left to train, so it is only asked again"
    minutes = after["seconds"] / 60
    with pytest.raises(UserError, match=r"has trained for .* give --minutes of at least"):
        quickstart.main(["--minutes=0.01"])
    steps = locate("mid").step
    short = {
        stage: f"--max_minutes={0.05 if stage in ('sft', 'rl') else 0.01}" for stage in LESSONS
    }
    monkeypatch.setattr(quickstart, "by_time", lambda seconds: short)
    quickstart.main([*CPU, f"--minutes={minutes + 2}"])
    further = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert "--new_horizon=stretch" in further["lengths"]["mid"]
    assert locate("mid").step > steps and further["seconds"] < 60 * (minutes + 4)
    assert (toy / "checkpoints" / "sft" / "quickstart.old").exists()


def test_a_budget_that_was_too_small_is_corrected(toy, monkeypatch, capsys):
    untrained = toy / "checkpoints/base/quickstart/step_000000"

    def too_short(argv):
        untrained.mkdir(parents=True)
        raise UserError("too short for one step")

    with monkeypatch.context() as m, pytest.raises(UserError, match="too short for one step"):
        m.setattr(base_train, "main", too_short)
        quickstart.main([*CPU, "--minutes=0.43"])
    assert not untrained.exists()
    diary = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert "base" not in diary["lengths"] and diary["notes"]["budget"]["minutes"] == 0.43
    with monkeypatch.context() as m:
        m.setattr(mid_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quickstart.main([*CPU, "--target=0.6"])
    diary = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert {*diary["lengths"].values()} == {"--num_iterations=2"} and locate("base").step == 2
    with monkeypatch.context() as m:  # another target, when midtraining is under way
        (toy / "checkpoints/mid/quickstart/step_000001").mkdir(parents=True)
        m.setattr(mid_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quickstart.main([*CPU, "--target=0.95"])
    diary = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    steps = {stage: int(flag.split("=")[1]) for stage, flag in diary["lengths"].items()}
    assert steps == {"base": 2, "mid": 2, "sft": 3, "rl": 3}
    said = capsys.readouterr().err
    assert "mid_train is under way and keeps the length" in said and ".old" not in said
    with pytest.raises(UserError, match=r"--minutes=8 and --target=0.9 set two budgets"):
        quickstart.main(["--minutes=8", "--target=0.9"])


@pytest.mark.parametrize("kept", [True, False])
def test_each_chain_has_its_own_tokenizer(toy, monkeypatch, kept):
    """Also if another chain has trained one before pretraining began."""
    with monkeypatch.context() as m:
        m.setattr(base_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quickstart.main(CPU)
    own = Tokenizer.load().fingerprint
    tok_train.main(["--data", "tinyworld@0.1", "--vocab_size=300"])
    assert Tokenizer.load().fingerprint != own
    if not kept:
        shutil.rmtree(toy / f"tokenizer_{own[:8]}")
    with monkeypatch.context() as m:
        m.setattr(mid_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quickstart.main(CPU)
    assert locate("base").meta["tokenizer"] == own == Tokenizer.load().fingerprint


def test_the_way_on_names_the_tag(toy):
    summary = {"accuracy": 0.5, "n": 8, "kinds": {}}
    said = quickstart.verdict(summary, QuickstartKnobs(model_tag="x"), 10.0)
    assert "quickstart --minutes 15 --model_tag x" in said
    assert "chat_cli -g x " in said and "serve -g x)" in said
    assert "model_tag" not in quickstart.verdict(summary, QuickstartKnobs(), 10.0)


# ---- steps


def test_a_signal_at_the_end_of_a_stage_ends_the_chain(toy):
    steps = chain.Chain(chain.Diary("quickstart", "x"))
    with pytest.raises(KeyboardInterrupt):
        steps.step("base", "pretraining", lambda: {"signal": 15})
    (run_directory("base", "x") / "step_000001").mkdir(parents=True)
    again = chain.Chain(chain.Diary("quickstart", "x"))
    assert again.step("base", "pretraining", lambda: 1 / 0) is None, "it is done"


def test_a_lost_terminal_ends_no_chain(toy, monkeypatch):
    class Lost(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stdout", Lost())
    steps = chain.Chain(chain.Diary("quickstart", "x"))
    steps.display.interval = 0.01
    assert steps.step("a", "a", lambda: time.sleep(0.1) or 7) == 7
    steps.display.terminal.close()
    assert steps.step("b", "b", lambda: 8) == 8


def test_the_time_of_a_step_is_noted_while_it_works(toy, monkeypatch):
    monkeypatch.setattr(chain, "SAVE_SECONDS", 0.05)
    steps = chain.Chain(chain.Diary("quickstart", "x", seconds_used=5.0))
    steps.display.interval = 0.01
    path = toy / "quickstart" / "x.json"

    def work():
        path.unlink()
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return json.loads(path.read_text())

    stored = steps.step("a", "a", work)
    assert stored["seconds"] >= 5 and stored["done"] == []


# ---- plans


def lengths(knobs, speed, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(quickstart, "speed_here", lambda _: (speed, 4e11))
    return quickstart.plan(knobs, quickstart.Diary("quickstart", "x", knobs.seconds_used))


def test_a_fast_machine_gets_steps_and_a_slow_one_minutes(monkeypatch, tmp_path, capsys):
    steps = lengths(QuickstartKnobs(), 10_000, monkeypatch, tmp_path)
    assert {flag.split("=")[0] for flag in steps.values()} == {"--num_iterations"}
    assert "100% of the planned steps" in capsys.readouterr().out
    fewer = lengths(QuickstartKnobs(target=0.6), 10_000, monkeypatch, tmp_path)
    assert int(fewer["mid"].split("=")[1]) < int(steps["mid"].split("=")[1])

    slow = lengths(QuickstartKnobs(), 1_000, monkeypatch, tmp_path)
    said = re.search(r"30 minutes are enough for (\d+)% of the", capsys.readouterr().out)
    assert said and 10 < int(said[1]) < 50
    assert {flag.split("=")[0] for flag in slow.values()} == {"--max_minutes"}
    total = sum(float(flag.split("=")[1]) for flag in slow.values())
    assert total == pytest.approx(30 - quickstart.CLOSING_SECONDS / 60, abs=0.1)

    timed = lengths(QuickstartKnobs(minutes=8, seconds_used=90), 10_000, monkeypatch, tmp_path)
    total = sum(float(flag.split("=")[1]) for flag in timed.values())
    assert total == pytest.approx(8 - 1.5 - quickstart.CLOSING_SECONDS / 60, abs=0.1)
    with pytest.raises(UserError, match=r"2 minutes are too few, because 2\.4 are already used"):
        lengths(QuickstartKnobs(minutes=2, seconds_used=120), 10_000, monkeypatch, tmp_path)


def test_a_new_budget_counts_what_the_stage_under_way_still_takes(toy):
    with Logbook(run_directory("base", "x"), config={}, step=0) as book:
        book.log(7, kind="train", seconds=60.0, progress=0.25)
    diary = chain.Diary("quickstart", "x")
    planned = quickstart.plan(QuickstartKnobs(minutes=10), diary, ["mid", "sft", "rl"])
    total = sum(float(flag.split("=")[1]) for flag in planned.values())
    assert {*planned} == {"mid", "sft", "rl"}
    assert total == pytest.approx(10 - 3 - quickstart.CLOSING_SECONDS / 60, abs=0.1)
    diary.done = ["base"]
    planned = quickstart.plan(QuickstartKnobs(minutes=10), diary, ["mid", "sft", "rl"])
    total = sum(float(flag.split("=")[1]) for flag in planned.values())
    assert total == pytest.approx(10 - quickstart.CLOSING_SECONDS / 60, abs=0.1)


def test_no_stage_of_a_short_budget_is_without_a_limit():
    assert {*quickstart.by_time(1.0).values()} == {"--max_minutes=0.01"}


def test_what_is_promised_was_measured():
    """More steps never answered less, and a reachable target gets the fewest steps."""
    assert list(quickstart.LEARNED) == sorted(quickstart.LEARNED)
    answered = [accuracy for _, accuracy in quickstart.LEARNED]
    assert answered == sorted(answered) and all(0 < accuracy < 1 for accuracy in answered)
    for share, accuracy in quickstart.LEARNED:
        assert f"{share:.0%} of the steps gave {accuracy:.0%}" in quickstart.expectation(1.0)
    file = Path(__file__).parents[1] / "dev/results/quickstart_chains.jsonl"
    records = map(json.loads, file.read_text().splitlines())
    shipped = [r for r in records if r["condition"] == "pair embeddings (shipped), one core"]
    for share, accuracy in quickstart.LEARNED:
        steps = round(share * quickstart.LESSONS["base"].steps)
        right = [r["rl"]["all"] / 100 for r in shipped if r["steps"][0] == steps]
        assert len(right) >= 3 and min(right) >= accuracy - quickstart.SPREAD
        assert abs(sum(right) / len(right) - accuracy) <= quickstart.SPREAD


def test_the_time_left_does_not_count_the_time_of_compiling(tmp_path):
    display = chain.Display(tmp_path / "log")
    at = {"kind": "train", "tok_per_sec": 5000.0}
    rows = [
        {**at, "seconds": 40.0, "progress": 0.01},  # the first step compiled for 39 seconds
        {**at, "seconds": 50.0, "progress": 0.11},
        {**at, "seconds": 90.0, "progress": 0.51},
    ]
    states = []
    for row in rows:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        states.append(display.state("pretraining", 100.0, tmp_path))
    assert "left" not in states[0] and "1%  5k tokens per second" in states[0]
    assert states[1].endswith("1m29s left") and states[2].endswith("49s left")


def test_models_that_were_deleted_are_trained_again(toy, capsys):
    quickstart.main(CPU)
    shutil.rmtree(run_directory("rl", "quickstart"))
    shutil.rmtree(run_directory("sft", "quickstart"))
    shutil.rmtree(run_directory("base", "quickstart"))  # nothing later needs it
    mid = locate("mid").path
    quickstart.main(CPU)
    assert "the model of chat_sft was deleted" in capsys.readouterr().err
    assert locate("mid").path == mid and locate("rl").step == 3
    with pytest.raises(UserError, match="from which it would be trained further, is not in"):
        quickstart.main([*CPU, "--minutes=90"])
    for stage in ("mid", "sft", "rl"):
        shutil.rmtree(run_directory(stage, "quickstart"))
    quickstart.main(CPU)
    assert locate("base").step == 3 == locate("rl").step


def test_a_step_that_fails_ends_its_line(tmp_path, capsys):
    shown = chain.Display(tmp_path / "log")
    with pytest.raises(UserError), shown.working("pretraining"):
        raise UserError("no text")
    assert re.search(r"pretraining\s+stopped after \d+s?\n", capsys.readouterr().out)


def test_a_chain_whose_models_were_all_deleted_starts_its_clock_again(base):
    done = ["tokenizer", "base", "mid"]
    stored = {"seconds": 500.0, "lengths": {"base": "--x"}, "notes": {"a": 1}, "done": done}
    folder = base / "chain"
    folder.mkdir(parents=True)
    (folder / "t.json").write_text(json.dumps(stored), encoding="utf-8")
    diary = chain.Diary("chain", "t", seconds_used=3.0)
    assert (diary.earlier, diary.done, diary.lengths) == (3.0, ["tokenizer"], {})
    (base / "checkpoints" / "base" / "t" / "step_000001").mkdir(parents=True)
    diary = chain.Diary("chain", "t", seconds_used=3.0)
    assert (diary.earlier, diary.done) == (503.0, ["tokenizer", "base"]), "one model is left"
