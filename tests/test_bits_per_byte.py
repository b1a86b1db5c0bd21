"""Bits per byte: by hand, over any cut, with memory running out."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from nanochat.base.common import UserError
from nanochat.commands import base_eval, base_loss
from nanochat.data.feed import Batch
from nanochat.eval import bits_per_byte
from nanochat.train.loop import recut

RELEASE = Path(__file__).resolve().parent / "golden" / "release_0.1"
BYTES = np.arange(61, dtype=np.int32) % 5  # every fifth token spells nothing


def bits(m, batches: Any, rows=8, token_bytes: np.ndarray = BYTES, runtime=tiny.CPU, **options):
    """The bits per byte of these batches, in place of those of shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bits_per_byte,
            "eval_batches",
            lambda given, rows_per_batch, **_: recut(given, rows_per_batch),
        )
        return bits_per_byte.shard_bits_per_byte(m, batches, token_bytes, runtime, rows, **options)


def by_hand(m, b: Batch) -> float:
    with torch.no_grad():
        logp = torch.log_softmax(m.logits(m(b.inputs)).double(), -1)
    nats = n = 0.0
    for row, targets in enumerate(b.targets.tolist()):
        for t, target in enumerate(targets):
            if target >= 0 and BYTES[target]:
                nats -= float(logp[row, t, target])
                n += int(BYTES[target])
    return nats / math.log(2) / n


def test_by_hand():
    m, b = tiny.randomise(tiny.model()), tiny.batch(ignored=0.4)
    expected = by_hand(m, b)
    values = [bits(m, [b], rows) for rows in (8, 5, 1)]
    assert values == [pytest.approx(expected, rel=1e-6)] * 3


def test_guessing_among_256_single_bytes_costs_8_bits():
    m = tiny.model(vocab_size=256)
    with torch.no_grad():
        m.head.weight.zero_()
    assert bits(m, [tiny.batch(vocab=256)], token_bytes=np.ones(256)) == pytest.approx(8.0)


def test_nothing_to_count_is_nan():
    m, b = tiny.model(), tiny.batch()
    assert math.isnan(bits(m, [Batch(b.inputs, torch.full_like(b.targets, -1))]))
    assert math.isnan(bits(m, []))
    assert math.isnan(bits(m, [b], token_bytes=np.zeros(61)))


def test_memory_that_runs_out_halves_the_rows_and_changes_nothing(monkeypatch, capsys):
    m, b = tiny.randomise(tiny.model()), tiny.batch(rows=8)
    expected, real, asked = bits(m, [b]), m.token_losses, []

    def limited(idx, targets):
        asked.append(idx.size(0))
        if idx.size(0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(idx, targets)

    monkeypatch.setattr(m, "token_losses", limited)
    m.train()
    assert bits(m, [b]) == pytest.approx(expected, rel=1e-6)
    assert asked == [8, 4, 2, 2, 2, 2] and m.training
    fitting = []
    bits(m, [b], on_fewer=fitting.append)
    bits(m, [b], 2, on_fewer=fitting.append)
    assert fitting == [2], "only what did not fit at first is worth remembering"
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "notice: out of memory with an evaluation batch of 4 rows: continuing with 2"
    )

    monkeypatch.setattr(
        m,
        "token_losses",
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(UserError, match="out of memory"):
        bits(m, [b])
    monkeypatch.setattr(m, "token_losses", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        bits(m, [b])


def test_ranks_are_summed_not_averaged(monkeypatch):
    """A rank with few bytes must not weigh as much as one with many."""
    m, b = tiny.randomise(tiny.model()), tiny.batch()
    parts = [Batch(b.inputs[rows], b.targets[rows]) for rows in (slice(5), slice(5, 8))]
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: sums.append(t.clone()))
    for part in parts:
        bits(m, [part], runtime=replace(tiny.CPU, world_size=2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(sum(sums)))
    assert bits(m, parts[:1], runtime=replace(tiny.CPU, world_size=2)) == pytest.approx(
        by_hand(m, b), rel=1e-6
    )


@pytest.mark.parametrize(
    ("command", "flags"), [(base_loss, []), (base_eval, []), (base_eval, ["--hf", "folder"])]
)
def test_a_misspelt_split_is_refused(command, flags):
    with pytest.raises(UserError, match=r"one of train, val \(got 'valid'\)"):
        command.main([*flags, "--splits", "val", "valid"])


def test_a_later_stage_reads_the_text_of_its_base_model(tmp_path, monkeypatch):
    folder = shutil.copytree(RELEASE, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.chdir(folder)  # where text.jsonl is
    flags = ["-i", "sft", "--eval_tokens=500", "--device_type=cpu", "--dtype=float32"]
    assert list(base_loss.main(flags)) == ["own/train", "own/val"]
    shutil.rmtree(folder / "checkpoints/base")
    with pytest.raises(UserError, match=r"no base model tagged 'old'.*--data"):
        base_loss.main(flags)
    assert list(base_loss.main([*flags, "--data", "new=text.jsonl", "--splits", "val"])) == [
        "new/val"
    ]
