"""Finetune a midtrained model on conversations, one a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat import stage
from nanochat.common import entry, print0
from nanochat.knobs import knob
from nanochat.tasks import mixture


@dataclass(kw_only=True)
class Knobs(stage.TrainKnobs):
    """Horizon and data"""

    data: tuple[str, ...] = knob(("tinyworld@8000",), "conversations: tinyworld[@N][:weight], name=FILE.jsonl[:weight] ...")
    num_iterations: int = knob(-1, "optimizer steps (-1 = by epochs)")
    epochs: int = knob(1, "passes over the conversations", low=1)
    conversations_per_step: int = knob(32, "conversations of an optimizer step", low=1)
    init_lr_frac: float = knob(0.3, "where the rates start, as a share of those of the earlier stages", low=0, high=1)
    source: Literal["mid", "base"] = knob("mid", "the stage to start from")
    step: int | None = knob(None, "step of the checkpoint to start from (default: the newest)")


def main(argv: Sequence[str] | None = None) -> dict:
    def work() -> dict:
        s = stage.open_child(Knobs, argv, "chat_sft", "sft", lambda k: k.source)
        k = s.knobs
        rows, (steps, epochs) = k.conversations_per_step, stage.talk_horizon(s)
        feed = s.feed(mixture.shards(k.data, "train", s.tokenizer, seed=1), rows, steps, epochs=epochs, mode="padded")
        val = [(shards.name, shards, weight) for shards, weight in mixture.shards(k.data, "val", s.tokenizer)]
        print0(f"  {rows} conversations a step")
        return stage.train(s, feed, rows, steps, [stage.val_probe(s, val)], rate_scale=k.init_lr_frac, one_shape=False)

    return stage.finish(work)


if __name__ == "__main__":
    entry(main)
