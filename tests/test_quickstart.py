"""The quickstart command: its plan, its whole chain at toy size, continuing and training further."""

import json
import re

import pytest

from nanochat.base.common import UserError
from nanochat.commands import mid_train, quickstart
from nanochat.commands.quickstart import LESSONS, QuickstartKnobs
from nanochat.model.checkpoint import locate
from nanochat.train import chain

TOY = {
    "base": "--data tinyworld@0.2 --depth=1 --model_dim=32 --head_dim=16 --sequence_len=64 "
    "--total_batch_size=256 --copy_heads=1 --convolutions",
    "mid": "--data tinyworld@60 --text tinyworld@0.2",
    "sft": "--data tinyworld@30 --conversations_per_step=4",
    "rl": "--tasks tinyworld/twostep --questions_per_step=2 --samples=2 --eval_items=2",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Toy lessons of three steps, on a machine that is said to be fast enough for them."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for stage, flags in TOY.items():
        flags += "" if stage == "rl" else " --eval_tokens=1000"
        work = 9 if stage == "mid" else 1
        monkeypatch.setitem(
            LESSONS, stage, LESSONS[stage]._replace(steps=3, step_tokens=work, flags=flags)
        )
    monkeypatch.setattr(quickstart, "TOKENIZER", "--data tinyworld@0.2 --vocab_size=400")
    monkeypatch.setattr(quickstart, "QUESTIONS", 16)
    monkeypatch.setattr(quickstart, "speed_here", lambda knobs: (1e6, 1e12))
    return tmp_path


CPU = ["--device_type=cpu", "--dtype=float32"]


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
    quickstart.main([*CPU, f"--minutes={minutes + 2}"])
    further = json.loads((toy / "quickstart" / "quickstart.json").read_text())
    assert "--new_horizon=stretch" in further["lengths"]["mid"]
    assert locate("mid").step > steps and further["seconds"] < 60 * (minutes + 4)
    assert (toy / "checkpoints" / "sft" / "quickstart.old").exists()


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
    with pytest.raises(UserError, match=r"2 minutes are too few, because 2\.4 are used"):
        lengths(QuickstartKnobs(minutes=2, seconds_used=120), 10_000, monkeypatch, tmp_path)


def test_what_is_promised_was_measured():
    """More steps never answered less, and a reachable target gets the fewest steps."""
    assert list(quickstart.LEARNED) == sorted(quickstart.LEARNED)
    answered = [accuracy for _, accuracy in quickstart.LEARNED]
    assert answered == sorted(answered) and all(0 < accuracy < 1 for accuracy in answered)
    for share, accuracy in quickstart.LEARNED:
        assert f"{accuracy:.0%} with {share:.0%}" in quickstart.expectation(1.0)


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
