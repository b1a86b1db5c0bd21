"""The chain of the quickstart at toy size: each stage starts from the last; one summary of all."""

import json

import pytest
import torch

from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.chat.generate import Engine, clip
from nanochat.commands import (
    base_eval,
    base_loss,
    base_train,
    chat_sft,
    mid_train,
    summary,
    tok_train,
)
from nanochat.commands import chat_eval as chat_eval_script
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import chat as chat_eval
from nanochat.eval.tasks import tinyworld
from nanochat.eval.tasks.common import Task
from nanochat.model import checkpoint
from nanochat.model.stages import run_directory

SHAPE = [
    "--depth=1",
    "--model_dim=32",
    "--head_dim=16",
    "--sequence_len=128",
    "--total_batch_size=512",
]
CPU = ["--device_type=cpu", "--dtype=float32"]
MID = [
    *CPU,
    "--data=tinyworld@60",
    "--text=tinyworld@0.2",
    "--num_iterations=3",
    "--eval_tokens=2000",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base folder with a tokenizer and a base, mid and sft model of a few steps each."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("NANOCHAT_BASE_DIR", str(folder))
        tok_train.main(["--data", "tinyworld@0.2", "--vocab_size=400"])
        base_train.main(
            [
                *SHAPE,
                *CPU,
                "--data",
                "tinyworld@0.2",
                "--num_iterations=4",
                "--eval_tokens=2000",
                "--sample_every=0",
            ]
        )
        mid_train.main(MID)
        chat_sft.main(
            [
                *CPU,
                "--data",
                "tinyworld@30",
                "--conversations_per_step=4",
                "--epochs=1",
                "--eval_tokens=2000",
            ]
        )
        yield folder


@pytest.fixture
def here(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def test_stages_hand_down(here):
    metas = {stage: checkpoint.locate(stage).meta for stage in ("base", "mid", "sft")}
    assert {m["config"]["n_embd"] for m in metas.values()} == {32}
    assert all(m["done"] for m in metas.values())
    assert metas["mid"]["horizon"]["rows"] == metas["base"]["horizon"]["rows"], (
        "midtraining keeps the batch of pretraining"
    )
    assert metas["sft"]["step"] == 8, "30 conversations, 4 a step, the last step short"
    assert metas["mid"]["knobs"]["dtype"] == "float32"
    assert checkpoint.locate("sft").tag == "d1"


def test_questions_and_summary(here, capsys):
    for stage in ("base", "mid", "sft"):
        found = chat_eval_script.main(["-i", stage, "-n", "16", *CPU])
        assert found["n"] == 16 and set(found["kinds"]) == set(tinyworld.KINDS)
        assert 0 <= found["lo"] <= found["accuracy"] <= found["hi"] <= 1
    made = summary.main([*CPU, "--samples=2", "--seconds=90"])
    kept = json.loads((here / "summary" / "d1" / "summary.json").read_text())
    assert kept == made and kept["minutes"] == 1.5
    assert set(kept["stages"]) == {"base", "mid", "sft"}
    for stage in kept["stages"].values():
        assert (
            stage["val_bpb"] > 0
            and stage["n"] == 16
            and stage["tokens"] > 0
            and set(stage["kinds"]) == set(tinyworld.KINDS)
        )
    assert "assistant:" in capsys.readouterr().out


def test_an_accuracy_that_cannot_be_stored_is_shown(here, monkeypatch, capsys):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(logbook.Logbook, "_open", refuse)
    assert chat_eval_script.main(["-i", "sft", "-n", "8", *CPU])["n"] == 8
    said, noticed = capsys.readouterr()
    assert "of 8 questions" in said and "chat_eval was not stored" in noticed


def test_a_summary_is_of_the_model_saved_last_even_without_its_base(here, tmp_path):
    base = here / "checkpoints" / "base"
    base.rename(tmp_path / "base")
    try:
        made = summary.main([*CPU, "--samples=0"])
    finally:
        (tmp_path / "base").rename(base)
    assert made["tag"] == "d1" and list(made["stages"]) == ["mid", "sft"]


def test_base_loss_and_base_eval(here):
    bpb = base_loss.main([*CPU, "--eval_tokens=2000"])
    assert set(bpb) == {"tinyworld/train", "tinyworld/val"} and all(1 < v < 8 for v in bpb.values())
    seen = base_eval.main([*CPU, "--eval_tokens=2000", "--max_tokens=4"])
    assert seen["bpb"] == {"tinyworld/val": bpb["tinyworld/val"]}
    assert all(len(texts) == 2 for texts in seen["samples"].values())
    assert [r for r in logbook.read(run_directory("base", "d1")) if r["kind"] == "base_eval"]


def test_a_finished_stage_has_nothing_to_do(here, capsys):
    before = checkpoint.locate("mid").path.stat().st_mtime_ns
    mid_train.main([*MID, "--resume=auto"])
    assert "nothing to do" in capsys.readouterr().out
    assert checkpoint.locate("mid").path.stat().st_mtime_ns == before


def test_stages_that_chat_log_replies_as_they_train(here):
    for stage in ("mid", "sft"):
        rows = logbook.read(run_directory(stage, "d1"))
        looks, samples = ([r for r in rows if r["kind"] == kind] for kind in ("eval", "sample"))
        assert [r["step"] for r in samples] == [r["step"] for r in looks if r["step"]]
        replies = [v for n, v in samples[-1].items() if n.startswith("sample/")]
        assert len(replies) == 4 and any(replies)


def test_no_parent_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no mid checkpoint .* nanochat mid_train"):
        chat_sft.main([])
    with pytest.raises(UserError, match="no task 'gsm9k'"):
        chat_eval_script.main(["-a", "gsm9k"])


def test_letters_are_chosen_among_the_item_s_own(here):
    tok = Tokenizer.load()
    model = checkpoint.locate("sft").model("cpu", torch.float32)
    items = tinyworld.TASKS["choice"].items("val", 12, 0)
    prompts = [clip(tok.render_prompt(Task.prompt(i)), 100) for i in items]
    one_letter = [["C"]] * len(items)
    assert chat_eval.choose_letters(Engine(model, tok), prompts, one_letter) == ["C"] * len(items)
    chosen = chat_eval.choose_letters(Engine(model, tok), prompts, [i["letters"] for i in items])
    alone = [
        chat_eval.choose_letters(Engine(model, tok), [p], [i["letters"]])[0]
        for p, i in zip(prompts, items, strict=True)
    ]
    assert chosen == alone, "padding must not change a choice"
