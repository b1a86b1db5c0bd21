"""Bits per byte of a checkpoint on the training and validation split of every source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base import knobs
from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.model.checkpoint import Loaded, load_for_inference
from nanochat.train.knobs import MachineKnobs
from nanochat.train.stage import session


@dataclass(kw_only=True)
class BitsPerByteKnobs(MachineKnobs):
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


def measure(k: BitsPerByteKnobs) -> tuple[Loaded, dict[str, float]]:
    """Load the model that the knobs name; returns it and its bits per byte by source/split."""
    loaded = load_for_inference(k.source, k.model_tag, k.step, k.device_type, k.dtype, k.seed)
    rt, tokenizer, meta = loaded.runtime, loaded.tokenizer, loaded.checkpoint.meta
    trained_on = meta["knobs"].get("data", ()) if meta["stage"] == "base" else ()
    print0(f"{loaded.checkpoint}: bits per byte on {rt.device.type}, {rt.dtype_name}")
    bpb: dict[str, float] = {}
    for source in training_sources(k.data or trained_on):
        for split in k.splits:
            shards = prepare(source, split, tokenizer)
            value = shard_bits_per_byte(
                loaded.model,
                shards,
                tokenizer.token_bytes(),
                rt,
                k.device_batch_size,
                k.eval_tokens,
            )
            bpb[f"{source.name}/{split}"] = value
            print0(f"  {source.name:<20} {split:<6} {value:.4f}")
    return loaded, bpb


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    k, _ = knobs.parse(BitsPerByteKnobs, argv, command="base_loss")
    with session():
        return measure(k)[1]


if __name__ == "__main__":
    entry(main)
