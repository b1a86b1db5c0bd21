"""Midtrain a base model: conversations, tool use and multiple choice, packed into rows like text."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat import stage
from nanochat.common import entry, print0
from nanochat.knobs import knob
from nanochat.tasks import mixture
from nanochat.tokens import prepare


@dataclass(kw_only=True)
class Knobs(stage.TrainKnobs):
    """Horizon and data"""

    data: tuple[str, ...] = knob(("tinyworld",), "conversations: tinyworld[@N][:weight], name=FILE.jsonl[:weight] ...")
    text: tuple[str, ...] = knob((), "text to keep in the mix, as for base_train: for example tinyworld@2, two megabytes of it")
    num_iterations: int = knob(-1, "optimizer steps (-1 = by epochs)")
    epochs: int = knob(1, "passes over the conversations", low=1)
    total_batch_size: int = knob(0, "tokens of an optimizer step; 0 = as in pretraining")
    step: int | None = knob(None, "step of the base checkpoint to start from (default: the newest)")


def main(argv: Sequence[str] | None = None) -> dict:
    def work() -> dict:
        s = stage.open_child(Knobs, argv, "mid_train", "mid", lambda k: "base")
        k, T = s.knobs, s.model.config.sequence_len
        rows = stage.whole_rows(k.total_batch_size, T) or s.stored("rows") or s.parent_meta["plan"]["rows"]
        steps, epochs = stage.talk_horizon(s)
        text = [(prepare(source, "train", s.tokenizer), source.weight) for source in (stage.sources_of(k.text) if k.text else ())]
        feed = s.feed(mixture.shards(k.data, "train", s.tokenizer) + text, rows, steps, epochs=epochs)
        val = [(shards.name, shards, weight) for shards, weight in mixture.shards(k.data, "val", s.tokenizer)]
        print0(f"  {rows * T:,} tokens a step ({rows} rows of {T})")
        return stage.train(s, feed, rows, steps, [stage.val_probe(s, val)])

    return stage.finish(work)


if __name__ == "__main__":
    entry(main)
