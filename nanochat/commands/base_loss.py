"""Bits per byte of a checkpoint on the training and validation split of every source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.base import knobs
from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import Runtime, open_runtime
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.bits_per_byte import of_shards
from nanochat.model import checkpoint
from nanochat.model.gpt import GPT
from nanochat.train import run as stage
from nanochat.train.knobs import MachineKnobs


@dataclass(kw_only=True)
class Knobs(MachineKnobs):
    """Evaluation"""

    source: Literal["base", "mid", "sft", "rl"] = knob("base", "stage of the model", alias="-i")
    data: tuple[str, ...] = knob(
        (), "text to read, as for base_train (default: what the model was trained on)"
    )
    splits: tuple[str, ...] = knob(("train", "val"), "splits to read")
    eval_tokens: int = knob(1 << 20, "tokens to read of every split", low=1)
    device_batch_size: int = knob(32, "rows at a time", low=1)
    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")


@dataclass
class Measured:
    path: Path
    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    meta: dict[str, Any]
    bpb: dict[str, float]  # by source/split


def measure(k: Knobs) -> Measured:
    """Load the checkpoint that the knobs name and read its bits per byte, printing a line a split."""
    path = checkpoint.locate(k.source, k.model_tag, k.step)
    rt = open_runtime(k.device_type, k.dtype, k.seed)
    tokenizer = Tokenizer.load()
    model, meta = checkpoint.load_model(path, rt.device, rt.dtype, tokenizer.fingerprint)
    trained_on = meta["knobs"].get("data", ()) if meta["stage"] == "base" else ()
    print0(f"{path}: bits per byte on {rt.device.type}, {rt.dtype_name}")
    found = Measured(path, rt, tokenizer, model, meta, {})
    for source in training_sources(k.data or trained_on):
        for split in k.splits:
            shards = prepare(source, split, tokenizer)
            value = of_shards(
                model, shards, tokenizer.token_bytes(), rt, k.device_batch_size, k.eval_tokens
            )
            found.bpb[f"{source.name}/{split}"] = value
            print0(f"  {source.name:<20} {split:<6} {value:.4f}")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    k, _ = knobs.parse(Knobs, argv, command="base_loss")
    with stage.session():
        return measure(k).bpb


if __name__ == "__main__":
    entry(main)
