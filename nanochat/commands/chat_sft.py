"""Finetune a midtrained model on conversations, one a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.data.sources import default_sources
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import newest
from nanochat.model.stages import run_directory
from nanochat.train import run as stage
from nanochat.train.knobs import TrainKnobs


@dataclass(kw_only=True)
class FinetuneKnobs(TrainKnobs):
    """Horizon and data"""

    data: tuple[str, ...] = knob(
        (),
        "conversations: NAME[@N][:weight] of smoltalk mmlu gsm8k arc-easy arc-challenge spellingbee identity tinyworld, name=FILE.jsonl "
        "(default: arc-easy arc-challenge gsm8k smoltalk@10000 spellingbee@600 identity; after pretraining on tinyworld, tinyworld@8000)",
    )
    task_dir: str = knob(
        "", "folder with the data of these (default: fetched from the hub into the base folder)"
    )
    name: str = knob("nanochat", "who the model says it is, in the conversations of identity")
    num_iterations: int = knob(-1, "optimizer steps (-1 = by epochs)")
    epochs: int = knob(1, "passes over the conversations", low=1)
    conversations_per_step: int = knob(32, "conversations of an optimizer step", low=1)
    init_lr_frac: float = knob(
        0.3, "where the rates start, as a share of those of the earlier stages", low=0, high=1
    )
    source: Literal["mid", "base"] = knob("mid", "the stage to start from")
    step: int | None = knob(None, "step of the checkpoint to start from (default: the newest)")


def main(argv: Sequence[str] | None = None) -> dict:
    def work() -> dict:
        s = stage.open_from_parent(FinetuneKnobs, argv, "chat_sft", "sft", lambda k: k.source)
        k = s.knobs
        rows, (steps, epochs) = k.conversations_per_step, stage.conversation_horizon(s)
        if not k.data:
            base = newest(run_directory("base", s.directory.name))
            texts = (base.meta if base else s.parent_meta)["knobs"]["data"]
            k.data = mixture.default("sft", texts or default_sources())
        print0(f"  conversations: {' '.join(k.data)}")
        talks = partial(
            mixture.shards,
            k.data,
            tokenizer=s.tokenizer,
            folder=Path(k.task_dir) if k.task_dir else None,
            name=k.name,
        )
        feed = s.feed(talks(split="train", seed=1), rows, steps, epochs=epochs, mode="padded")
        val = [(shards.name, shards, weight) for shards, weight in talks(split="val")]
        print0(f"  {rows} conversations a step")
        return stage.train(
            s,
            feed,
            rows,
            steps,
            [stage.bits_per_byte_evaluation(s, val)],
            rate_scale=k.init_lr_frac,
            one_shape=False,
        )

    with stage.session():
        return work()


if __name__ == "__main__":
    entry(main)
