"""The measurements in bench/ start, and the training step is measured on tiny models."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from nanochat.base.common import UserError

BENCHES = sorted(p.stem for p in (Path(__file__).parent.parent / "bench").glob("*.py"))
BENCHES.remove("race_head")  # race.py runs it, in the opponent's environment
BENCHES.remove("bandwidth")  # decode.py and gpu_first.py measure with it


@pytest.mark.parametrize("name", BENCHES)
def test_the_help_of_a_measurement(name, capsys, monkeypatch):
    """Its knobs are read and its help is printed."""
    monkeypatch.setattr(sys, "argv", [name, "-h"])
    with pytest.raises(SystemExit) as e:
        importlib.import_module(f"bench.{name}").main()
    assert e.value.code == 0 and "--" in capsys.readouterr().out


def test_chunks_of_the_loss_are_measured():
    from bench import loss_chunks

    flags = ["--model_dim=8", "--vocab_size=64", "--rows=32", "--chunks", "8", "11", "--rounds=1"]
    made = loss_chunks.main([*flags, "--no_compiled", "--device_type=cpu", "--dtype=float32"])
    assert [(row["rows"], row["block"]) for row in made] == [(4, 2), (4, 8), (32, 2), (32, 8)]
    assert all(row["ms"] > 0 for row in made)


def test_a_training_step_is_measured_eager():
    from bench import train_step

    shape = ["--depth=1", "--model_dim=32", "--head_dim=16", "--sequence_len=32"]
    flags = [*shape, "--vocab_size=64", "--batch=2", "--steps=2", "--modes=eager"]
    row = train_step.main([*flags, "--device_type=cpu", "--dtype=float32"])
    assert row["mode"] == "eager" and row["tok_per_sec"] > 0 and row["step_ms"] >= row["best_ms"]


def a_race(folder, **settings):
    from bench import race

    given = {"characters": 58_000, "held_out": 2_000, "checkout": "there", **settings}
    return race, race.Race(race.RaceKnobs(**given), folder / "work", folder)


def test_a_race_reads_no_more_characters_when_a_file_ends(tmp_path):
    """The short file has one document, of a tenth of its size; the long one has ten."""
    short, long = tmp_path / "short.jsonl", tmp_path / "long.txt"
    short.write_text(json.dumps({"text": "a" * 10_000, "more": "b" * 90_000}))
    long.write_text("".join(f"{n} " * 4_000 + "\n\n" for n in range(10, 30)))
    race, one = a_race(tmp_path, texts=(str(short), str(long)))
    race.prepare(one)
    stored = json.loads((one.work / "texts.json").read_text())
    assert 58_000 <= stored["train"] + stored["held_out"] < 60_000


@pytest.mark.parametrize(
    "change", [{"depth": 5}, {"flags": "--seed=2"}, {"vocab_size": 999}], ids=str
)
def test_a_race_goes_on_only_with_its_settings(tmp_path, change):
    text = tmp_path / "text.txt"
    text.write_text("words " * 9_000)
    race, one = a_race(tmp_path, texts=(str(text),))
    race.prepare(one)
    race.prepare(a_race(tmp_path, texts=(str(text),), minutes=(9.0,))[1])
    with pytest.raises(UserError, match=f"a race with another --{next(iter(change))}"):
        race.prepare(a_race(tmp_path, texts=(str(text),), **change)[1])


def test_a_race_needs_texts_that_hold_something(tmp_path):
    (tmp_path / "nanochat").mkdir()
    for file in ("nanochat/gpt.py", "empty.txt"):
        (tmp_path / file).touch()
    race, one = a_race(tmp_path, texts=(str(tmp_path / "empty.txt"),), checkout=str(tmp_path))
    with pytest.raises(UserError, match=r"empty.txt is not a file, or is empty"):
        race.opened(one.knobs)


def test_a_race_keeps_the_lines_of_a_text_together(tmp_path):
    from bench.race_head import read

    texts = ["one\u2028two\x85three", "four\nfive"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == texts
