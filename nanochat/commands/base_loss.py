"""Bits per byte of a checkpoint on the training and validation split of every source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.base.common import UserError, entry, opening, print0
from nanochat.base.knobs import ReadingKnobs, knob, parse
from nanochat.train.knobs import MachineKnobs, ModelKnobs

if TYPE_CHECKING:
    from nanochat.model.checkpoint import Loaded


@dataclass(kw_only=True)
class BitsPerByteKnobs(ModelKnobs, MachineKnobs, ReadingKnobs):
    """Evaluation"""

    source: Literal["base", "mid", "sft", "rl"] = knob("base", "stage of the model", alias="-i")
    data: tuple[str, ...] = knob(
        (), "text to read, as for base_train (default: what the model was trained on)"
    )
    splits: tuple[Literal["train", "val"], ...] = knob(("train", "val"), "splits to read")
    eval_tokens: int = knob(1 << 20, "tokens to read per split", low=1)
    device_batch_size: int = knob(32, "rows per forward pass", low=1)


def measure(knobs: BitsPerByteKnobs) -> tuple["Loaded", dict[str, float]]:
    """Load the model that the knobs name; returns it and its bits per byte by source/split."""
    from nanochat.model.checkpoint import load_for_inference

    loaded = load_for_inference(
        knobs.source, knobs.model_tag, knobs.step, knobs.device_type, knobs.dtype, knobs.seed
    )
    return loaded, measure_splits(knobs, loaded, knobs.data or pretraining_text(loaded))


def pretraining_text(loaded: "Loaded") -> Sequence[str]:
    """The --data of base_train for a model of whatever stage; UserError if that run is gone."""
    from nanochat.model.checkpoint import newest
    from nanochat.model.stages import run_directory

    base = loaded.checkpoint
    if loaded.stage != "base":
        base = newest(run_directory("base", base.tag))
    if base is None:
        raise UserError(
            f"there is no base model tagged {loaded.checkpoint.tag!r} to say which text it was "
            "trained on: name the text with --data"
        )
    return base.meta["knobs"].get("data", ())


def measure_splits(knobs: BitsPerByteKnobs, loaded: Any, data: Sequence[str]) -> dict[str, float]:
    """The bits per byte of a Loaded or a ForeignEngine, by source/split."""
    from nanochat.data.shards import prepare
    from nanochat.data.sources import training_sources
    from nanochat.eval.bits_per_byte import shard_bits_per_byte

    token_bytes = loaded.tokenizer.token_bytes()
    print0(f"{loaded.describe()}: bits per byte")
    results: dict[str, float] = {}
    for source in training_sources(data, knobs.skip_bad_rows):
        for split in knobs.splits:
            value = shard_bits_per_byte(
                loaded.model,
                prepare(source, split, loaded.tokenizer),
                token_bytes,
                loaded.runtime,
                knobs.device_batch_size,
                knobs.eval_tokens,
            )
            results[f"{source.name}/{split}"] = value
            print0(f"  {source.name:<20} {split:<6} {value:.4f}")
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    knobs, _ = parse(BitsPerByteKnobs, argv, command="base_loss")
    opening("base_loss")

    from nanochat.train.stage import session

    with session():
        return measure(knobs)[1]


if __name__ == "__main__":
    entry(main)
