"""The pilot: a recipe is tried for a short time, corrected and judged."""

import json
import sys

import pytest
import tiny

from nanochat.base import knobs, logbook
from nanochat.base.common import UserError
from nanochat.commands import base_train
from nanochat.model import checkpoint
from nanochat.plan import day, law, memory, pilot, recipe
from nanochat.plan.machine import GIB, Machine


def test_the_target_is_judged():
    bpb = (1.0, 0.95, 1.05)
    assert "are within reach: 1.000 (0.950 to 1.050)" in pilot.verdict(1.1, bpb)
    assert "are uncertain" in pilot.verdict(1.0, bpb)
    assert "are out of reach" in pilot.verdict(0.9, bpb)


@pytest.mark.parametrize("missing", ["recipe.toml", "recipe.json"])
def test_without_a_recipe(tmp_path, missing):
    (tmp_path / "recipe.toml").write_text("[base_train]\ndepth = 2\n")
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=r"make one with nanochat plan recipe"):
        pilot.read(str(tmp_path / "recipe.toml"))


@pytest.mark.parametrize(
    "plan",
    ['{"primary": {}}', '{"knobs": {"renamed_knob": 3}}', '{"knobs": {"pretrain": 0.01}}'],
)
def test_a_plan_of_another_version_is_refused(tmp_path, plan):
    (tmp_path / "recipe.toml").write_text("[base_train]\ndepth = 2\n")
    (tmp_path / "recipe.json").write_text(plan)
    with pytest.raises(
        UserError, match=r"no recipe of this version.*make one with nanochat plan recipe"
    ):
        pilot.read(str(tmp_path / "recipe.toml"))


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A recipe for five minutes of a machine of which memory is known by formula; its file."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def predict(config, rows, target, compiled):
        T = config.sequence_len
        parts = dict.fromkeys(("state", "beside", "allocated"), 0)
        return {**parts, "total": 10**8 + 4 * rows * T + round(target.memory_gap or 0)}

    monkeypatch.setattr(memory, "predict", predict)
    mine = Machine("Toy", "cpu", "float32", 4 * GIB, 2e9, source="the test")
    monkeypatch.setattr(day, "planned_machine", lambda knobs: mine)
    kept = ("--data", "--depth", "--model_dim", "--head_dim", "--kv_ratio", "--sequence_len")
    words = [f for f in tiny.workplace(tmp_path) if f.startswith(kept)]
    ask = [*words, "--minutes=5", "--total_batch_size=512", "--device_batch_size=16"]
    recipe.run(knobs.parse(recipe.RecipeKnobs, [*ask, "--model_tag=t"], command="plan recipe")[0])
    return tmp_path / "plan" / "recipe.toml"


def run_pilot(*words):
    return pilot.run(knobs.parse(pilot.PilotKnobs, words, command="plan pilot")[0])


def test_a_pilot_too_short_is_refused_with_the_minutes_that_would_do(planned, monkeypatch):
    monkeypatch.setattr(pilot, "train", lambda *a: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"too few to say anything: give at least --minutes=") as e:
        run_pilot("--minutes=0.2")
    assert e.value.status == 3, "so that a script can go on without it"
    least = float(str(e.value).split("--minutes=")[1].split(",")[0])
    with pytest.raises(pytest.fail.Exception, match="trained"):
        run_pilot(f"--minutes={least}")


@pytest.mark.parametrize(("steps", "end"), [(1, 3.0), (64, None)])
def test_a_pilot_from_which_nothing_follows_is_refused(planned, monkeypatch, steps, end):
    """Of a machine that is far slower than planned, or without validation text."""
    made = {"steps": steps, "tokens": 0, "tok_per_sec": 0.0, "final_bpb": end}
    monkeypatch.setattr(pilot, "short_run", lambda *a: {**made, "peak_memory_bytes": 1})
    before = planned.read_text()
    with pytest.raises(UserError, match=r"too few to say anything|no bits per byte") as e:
        run_pilot("--minutes=2")
    assert e.value.status == 3 and planned.read_text() == before


def test_a_pilot_that_fails_is_no_refusal(monkeypatch):
    failing = {"args": [sys.executable, "-c", "raise SystemExit(2)"]}
    monkeypatch.setattr(pilot, "module_process", lambda *a: failing)
    with pytest.raises(UserError, match="the pilot failed with exit status 2") as e:
        pilot.train([])
    assert e.value.status == 2


def test_a_recipe_is_tried_and_corrected(planned, tmp_path, monkeypatch, capsys):
    """All of it, with base_train in this process and steps of milliseconds."""
    before = json.loads(planned.with_suffix(".json").read_text())
    calls = []

    def train(words):
        calls.append(words)
        here = ["--device_type=cpu", "--dtype=float32", "--compile=off", "--eval_tokens=2000"]
        base_train.main([*words, *here, "--max_minutes=0", "--num_iterations=64"])

    monkeypatch.setattr(pilot, "train", train)
    result = run_pilot("--target_bpb=0.01", "--minutes=2")
    assert len(calls) == 1 and "--max_minutes=2" in calls[0]
    run = result["run"]
    ratio = run["tok_per_sec"] / before["primary"]["speed"][0]
    assert result["speed_ratio"] == pytest.approx(ratio)
    after = json.loads(planned.with_suffix(".json").read_text())
    chosen = after["primary"]
    assert after["machine"]["factor"] == pytest.approx(ratio)
    assert chosen["speed"][0] == pytest.approx(run["tok_per_sec"], rel=0.01)
    assert chosen["memory"]["total"] == pytest.approx(run["peak_memory_bytes"], rel=0.01)
    moved = law.Law(**after["law"])
    layers = 12 * chosen["config"]["n_layer"] * chosen["config"]["n_embd"] ** 2
    assert moved.bpb(layers, moved.pilot) == pytest.approx(run["final_bpb"], rel=0.2)
    assert moved.factor != 1 and chosen["bpb"][0] < run["final_bpb"]
    assert "out of reach" in result["target"] and "which was tried" in capsys.readouterr().out
    knobs.parse(base_train.PretrainKnobs, ["--recipe", str(planned)], command="base_train")
    (directory,) = (tmp_path / "checkpoints" / "base").iterdir()
    assert checkpoint.list_checkpoints(directory) == [] and logbook.read(directory), (
        "the weights go, the figures stay"
    )
    file = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[len(rows) // 2 :]:
        row["seconds"] = row.get("seconds", 0.0) + 1000
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = pilot.short_run(planned, calls[0][-2:])
    assert len(calls) == 1, "the same pilot is not trained twice"
    assert again["tok_per_sec"] == run["tok_per_sec"], "what lies between its steps does not count"
