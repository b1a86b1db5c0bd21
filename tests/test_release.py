"""
Checkpoints of an earlier release still work: tests/golden/release_0.1 holds a tokenizer, a base run stopped at step 6 of 12, and a
finetuned model, all written by commit bf65c5b. The base run must resume to the recorded losses, and the finetuned model must chat.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat.commands import base_train, chat_cli

RELEASE = Path(__file__).resolve().parent / "golden" / "release_0.1"
EXPECTED = json.loads((RELEASE / "expected.json").read_text())


def test_a_base_run_resumes_to_the_recorded_end(release):
    base_train.main(["--model_tag=old", "--resume=auto", "--data", "own=text.jsonl"])
    rows = [
        json.loads(line)
        for line in (release / "checkpoints/base/old/metrics.jsonl").read_text().splitlines()
    ]
    losses = {str(r["step"]): r["loss"] for r in rows if r["kind"] == "train" and r["step"] > 6}
    assert losses.keys() == EXPECTED["losses"].keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(EXPECTED["losses"][step], rel=1e-5)
    weights = load_file(release / "checkpoints/base/old/step_000012/model.safetensors")
    assert weights.keys() == EXPECTED["norms"].keys()
    for name, tensor in weights.items():
        assert float(tensor.to(torch.float64).norm()) == pytest.approx(
            EXPECTED["norms"][name], rel=1e-4
        )


@pytest.mark.usefixtures("offline")
def test_a_finetuned_model_chats(release, capsys):
    words = ["-i", "sft", "-t", "0", "-m", "12", "--device_type=cpu", "--dtype=float32"]
    chat_cli.main([*words, "-p", "Which pet do I have?"])
    assert capsys.readouterr().out.strip() == EXPECTED["answer"]
