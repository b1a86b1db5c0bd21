"""Midtrain a base model on conversations, tool use and multiple choice, packed like text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.base.common import entry, opening, print0
from nanochat.base.knobs import ConversationKnobs, knob, parse
from nanochat.train.knobs import LaterStageKnobs


@dataclass(kw_only=True)
class MidtrainKnobs(LaterStageKnobs, ConversationKnobs):
    """Data"""

    data: tuple[str, ...] = knob(
        (),
        "conversations: NAME[@N][:weight] with a NAME from smoltalk mmlu gsm8k arc-easy "
        "arc-challenge spellingbee identity tinyworld everyday, or name=PATH (default: smoltalk "
        "mmlu gsm8k spellingbee identity; after pretraining on tinyworld, tinyworld)",
    )
    text: tuple[str, ...] = knob(
        (), "text to mix in, as for base_train; tinyworld@2 is two megabytes of tinyworld"
    )
    total_batch_size: int = knob(0, "tokens per optimizer step (0 = as in pretraining)", low=0)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    began = time.monotonic()
    knobs, origins = parse(MidtrainKnobs, argv, command="mid_train")
    opening("mid_train", log=True)

    from nanochat.data import inventory
    from nanochat.data.sources import check_weights, training_sources
    from nanochat.eval.tasks import mixture
    from nanochat.study import report
    from nanochat.train import stage
    from nanochat.train.horizon import conversation_horizon, whole_rows
    from nanochat.train.run import open_from_parent

    with stage.session():
        run = open_from_parent("mid", "base", knobs, origins, began)
        T = run.model.config.sequence_len
        rows = whole_rows(run.knobs.total_batch_size, T) or run.stored("rows")
        horizon = conversation_horizon(run, rows or run.parent.meta["horizon"]["rows"])
        # Whether an epoch is long enough to compile for a CPU is known once its data is open
        late = horizon.epochs and run.runtime.device.type == "cpu" and run.knobs.compile == "auto"
        if not late:
            stage.compile_if_it_pays(run, horizon)
        stage.choose_conversations(run)
        texts = training_sources(run.knobs.text, run.knobs.skip_bad_rows) if run.knobs.text else []
        inventory.show(texts)
        check_weights([*mixture.parse(run.knobs.data), *texts])
        shards = stage.conversation_shards(run, "train") + stage.text_shards(run, texts, "train")
        feed = stage.row_feed(run, shards, horizon)
        if late:
            stage.compile_if_it_pays(run, horizon, epoch_tokens=feed.order.total)
        val = stage.conversation_shards(run, "val")
        stage.summarise_data(run, feed, val, horizon)
        print0(f"  {horizon.rows * T:,} tokens per step ({horizon.rows} rows of {T})")
        evaluations = [
            stage.bits_per_byte_evaluation(run, val, feed, horizon),
            stage.sample_evaluation(run),
        ]
        return report.train_and_report(run, feed, horizon, evaluations)


if __name__ == "__main__":
    entry(main)
