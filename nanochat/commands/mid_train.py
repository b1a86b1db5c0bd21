"""Midtrain a base model: conversations, tool use and multiple choice, packed into rows like text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.data.shards import prepare
from nanochat.data.sources import default_sources, training_sources
from nanochat.eval.tasks import mixture
from nanochat.train import run as stage
from nanochat.train.knobs import TrainKnobs


@dataclass(kw_only=True)
class MidtrainKnobs(TrainKnobs):
    """Horizon and data"""

    data: tuple[str, ...] = knob(
        (),
        "conversations: NAME[@N][:weight] of smoltalk mmlu gsm8k arc-easy arc-challenge spellingbee identity tinyworld, name=FILE.jsonl "
        "(default: smoltalk mmlu gsm8k spellingbee identity; after pretraining on tinyworld, tinyworld)",
    )
    task_dir: str = knob(
        "", "folder with the data of these (default: fetched from the hub into the base folder)"
    )
    name: str = knob("nanochat", "who the model says it is, in the conversations of identity")
    text: tuple[str, ...] = knob(
        (),
        "text to keep in the mix, as for base_train: for example tinyworld@2, two megabytes of it",
    )
    num_iterations: int = knob(-1, "optimizer steps (-1 = by epochs)")
    epochs: int = knob(1, "passes over the conversations", low=1)
    total_batch_size: int = knob(0, "tokens of an optimizer step; 0 = as in pretraining")
    step: int | None = knob(None, "step of the base checkpoint to start from (default: the newest)")


def main(argv: Sequence[str] | None = None) -> dict:
    def work() -> dict:
        s = stage.open_from_parent(MidtrainKnobs, argv, "mid_train", "mid", lambda k: "base")
        k, T = s.knobs, s.model.config.sequence_len
        rows = (
            stage.whole_rows(k.total_batch_size, T)
            or s.stored("rows")
            or s.parent_meta["horizon"]["rows"]
        )
        steps, epochs = stage.conversation_horizon(s)
        text = [
            (prepare(source, "train", s.tokenizer), source.weight)
            for source in (training_sources(k.text) if k.text else ())
        ]
        k.data = k.data or mixture.default(
            "mid", s.parent_meta["knobs"]["data"] or default_sources()
        )
        print0(f"  conversations: {' '.join(k.data)}")
        talks = partial(
            mixture.shards,
            k.data,
            tokenizer=s.tokenizer,
            folder=Path(k.task_dir) if k.task_dir else None,
            name=k.name,
        )
        feed = s.feed(talks(split="train") + text, rows, steps, epochs=epochs)
        val = [(shards.name, shards, weight) for shards, weight in talks(split="val")]
        print0(f"  {rows * T:,} tokens a step ({rows} rows of {T})")
        return stage.train(s, feed, rows, steps, [stage.bits_per_byte_evaluation(s, val)])

    with stage.session():
        return work()


if __name__ == "__main__":
    entry(main)
