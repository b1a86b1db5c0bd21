"""Finetune a midtrained model on conversations, one per row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.base.common import entry, opening, print0
from nanochat.base.knobs import ConversationKnobs, knob, parse
from nanochat.train.knobs import LaterStageKnobs


@dataclass(kw_only=True)
class FinetuneKnobs(LaterStageKnobs, ConversationKnobs):
    """Data"""

    source: Literal["mid", "base"] = knob("mid", "stage to start from")
    data: tuple[str, ...] = knob(
        (),
        "conversations: NAME[@N][:weight] with a NAME from smoltalk mmlu gsm8k arc-easy "
        "arc-challenge spellingbee identity tinyworld everyday, or name=PATH (default: arc-easy "
        "arc-challenge gsm8k smoltalk@10000 spellingbee@600 identity; after pretraining on "
        "tinyworld, tinyworld@8000)",
    )
    conversations_per_step: int = knob(32, "conversations per optimizer step", low=1)
    init_lr_frac: float = knob(
        0.3, "initial learning rates, as a share of those in the earlier stages", low=0, high=1
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    began = time.monotonic()
    knobs, origins = parse(FinetuneKnobs, argv, command="chat_sft")
    opening("chat_sft", log=True)

    from nanochat.study import report
    from nanochat.train import stage
    from nanochat.train.horizon import conversation_horizon
    from nanochat.train.run import open_from_parent

    with stage.session():
        run = open_from_parent("sft", knobs.source, knobs, origins, began)
        horizon = conversation_horizon(run, run.knobs.conversations_per_step)
        stage.compile_if_it_pays(run, horizon, one_shape=False)
        stage.choose_conversations(run)
        shards = stage.conversation_shards(run, "train", seed=1)
        feed = stage.row_feed(run, shards, horizon, mode="padded")
        val = stage.conversation_shards(run, "val")
        stage.summarise_data(run, feed, val, horizon)
        print0(f"  {horizon.rows} conversations per step")
        evaluations = [
            stage.bits_per_byte_evaluation(run, val, feed, horizon),
            stage.sample_evaluation(run),
        ]
        rate_scale = run.knobs.init_lr_frac
        return report.train_and_report(run, feed, horizon, evaluations, rate_scale)


if __name__ == "__main__":
    entry(main)
