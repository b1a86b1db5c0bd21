"""
Golden losses: ten steps of each kind of training with a fixed seed in float32. If these numbers
change, training has changed. If that is meant, run

    python tests/test_golden.py

which rewrites tests/golden/losses.json. A kind of training is one function in KINDS that returns
its ten losses.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
import toy  # noqa: E402

from nanochat.model.gpt import GPT  # noqa: E402
from nanochat.train.loop import Feed  # noqa: E402
from nanochat.train.schedule import Schedule  # noqa: E402

FILE = ROOT / "tests" / "golden" / "losses.json"
STEPS = 10


def ten_losses(feed: Feed, m: GPT | None = None, lr_scale: float = 1.0, **knobs) -> list[float]:
    m = m or tiny.model(seed=7, **knobs)
    with tempfile.TemporaryDirectory() as folder:
        schedule = Schedule(warmup=0.2, decay=0.4, final=0.1, momentum_warmup=5)
        optimizer = tiny.optimizer(m, weight_decay=0.01, lr_scale=lr_scale)
        tiny.fit(Path(folder), m, feed, schedule, optimizer=optimizer)
        return tiny.losses(folder)


def text(**batch) -> tiny.ListFeed:
    """Steps over four batches that come again, so that there is something to learn."""
    batches = [tiny.batch(seed=i, **batch) for i in range(4)]
    return tiny.ListFeed([batches[i % 4] for i in range(STEPS)], device_rows=3)


def reinforced() -> list[float]:
    """Of the policy's own replies: what is sampled hangs on the weights of the step before."""
    m = toy.policy(toy.words())
    return ten_losses(
        toy.feed(toy.words(), m, samples=6, device_rows=5, total=4 * STEPS), m, lr_scale=0.1
    )


KINDS = {
    "base": lambda: ten_losses(text()),
    "base, other knobs": lambda: ten_losses(
        text(), activation="swiglu", tie_embeddings=True, softcap=0.0, window_pattern="SL"
    ),
    "masked as in sft": lambda: ten_losses(text(ignored=0.5)),
    "weighted as in rl": lambda: ten_losses(text(weighted=True)),
    "rl": reinforced,
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_golden_ones(kind):
    golden = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    assert len(golden) == STEPS and len(set(golden)) == STEPS
    assert KINDS[kind]() == pytest.approx(golden, rel=2e-5, abs=2e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(
        json.dumps({kind: [round(x, 6) for x in f()] for kind, f in KINDS.items()}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    print(FILE.read_text())
