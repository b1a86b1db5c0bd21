"""The measurements in bench/ start, and the training step is measured on tiny models."""

import importlib
import sys
from pathlib import Path

import pytest

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
