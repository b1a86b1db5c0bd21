"""Curves of reinforcement over seeds: what is refused, what is linked, tables and the picture."""

import io

import pytest
import tiny
from matplotlib.image import imread

from bench import rl_curves
from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.model import checkpoint
from nanochat.model.stages import run_directory


def made(seed: int) -> dict:
    """The record of a run of 30 steps whose reward rises, more with some seeds than with others."""
    kinds = ("sums", "spelling")
    before, after = (
        {
            kind: {"accuracy": a + 0.01 * seed, "n": 50, "lo": 0.0, "hi": 1.0}
            for kind, a in zip(kinds, two, strict=True)
        }
        for two in ((0.4, 0.9), (0.8 + 0.02 * seed, 0.9))
    )
    train = [{"step": i, "reward": i / 40 + seed / 50} for i in range(1, 31)]
    looks = [
        {
            "step": i,
            "seconds": i,
            "pass@1": i / 40,
            "pass@1_lo": 0.0,
            "pass@1_hi": 1.0,
            "pass@8": i / 35,
        }
        for i in (0, 15, 30)
    ]
    return {"seed": seed, "before": before, "after": after, "train": train, "eval": looks}


def test_seeds_are_put_together():
    records = [made(seed) for seed in (1, 2, 3)]
    found = rl_curves.table(records)
    cells = list(zip(*(column.cells for column in found.columns), strict=True))
    assert cells[0][:4] == ("sums", "50", "42.0 %", "86.0 %") and cells[0][4].startswith(
        "+44.0 (+39.0 to +49.0)"
    )
    assert cells[1][4].startswith("+0.0 (")
    image = imread(io.BytesIO(rl_curves.picture(records)))
    assert image.shape[0] > 300 and image.shape[1] > 900 and image.std() > 0.05
    assert "to" not in next(iter(rl_curves.table(records[:1]).columns[4].cells)), (
        "one seed has no interval"
    )


def test_a_length_in_minutes_is_refused():
    with pytest.raises(UserError, match="busy machine"):
        rl_curves.main(["--flags=--max_minutes=1"])
    with pytest.raises(UserError, match="samplez"):
        rl_curves.main(["--flags=--samplez=3"])


def test_a_run_is_made_once_and_every_seed_and_flag_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "tokenizer").mkdir()
    m = tiny.model()
    folder = run_directory("sft", "t")
    start = checkpoint.save(folder, 3, tiny.weights(m), {}, tiny.meta(m)).path
    said = []

    def run(base, command, *words):
        """What the commands leave behind, without their work."""
        said.append((command, words))
        stage = "rl" if command == "chat_rl" or words[1] == "rl" else "sft"
        with logbook.Logbook(base / "checkpoints" / stage / "t") as log:
            if command == "chat_eval":
                log.log(
                    kind="chat_eval",
                    step=3,
                    kinds={"sums": {"accuracy": 0.5, "n": 4, "lo": 0.1, "hi": 0.9}},
                )
            elif not [
                r for r in logbook.read(base / "checkpoints" / stage / "t") if r["kind"] == "train"
            ]:
                numbers = dict.fromkeys(
                    (
                        "seconds",
                        "reward",
                        "zero_variance",
                        "truncated",
                        "length",
                        "rollout_seconds",
                    ),
                    0.25,
                )
                log.log(step=1, **numbers)
                log.log(kind="eval", step=1, seconds=1.0, **{"pass@1": 0.5, "pass@8": 0.75})

    monkeypatch.setattr(rl_curves, "run", run)
    k = rl_curves.Knobs(num_items=4)
    first = rl_curves.record(k, start, ["--num_iterations=1"], 1)
    assert (
        first == rl_curves.record(k, start, ["--num_iterations=1"], 1)
        and first["eval"][0]["pass@8"] == 0.75
    )
    assert [c for c, _ in said] == ["chat_eval", "chat_rl", "chat_eval", "chat_rl"], (
        "chat_rl itself knows that it is through"
    )
    assert said[1][1] == ("--source=sft", "--seed=1", "--resume=auto", "--num_iterations=1")
    places = {
        rl_curves.place(rl_curves.Knobs(source="sft"), start, flags, seed)
        for flags in ([], ["--x"])
        for seed in (1, 2)
    }
    assert len(places) == 4 and all(
        checkpoint.newest(p / "checkpoints" / "sft" / "t").path.resolve() == start.resolve()
        for p in places
    )
    again = checkpoint.save(folder, 3, tiny.weights(tiny.model(2)), {}, tiny.meta(m)).path
    trained_again = rl_curves.place(rl_curves.Knobs(source="sft"), again, [], 1)
    assert again == start and trained_again not in places, "results are those of the same weights"
