"""ARC (Clark et al. 2018, arXiv 1803.05457): science questions of primary school, an easy and a challenging set."""

from typing import Any

from nanochat.eval.tasks.common import LETTERS, Item, Task, choice, gold, is_answer, prompt
from nanochat.eval.tasks.data import DataSet, items_of


def item(row: dict[str, Any]) -> Item:
    """A row of the hub's, or of the CORE bundle's layout. Options are lettered anew: a few questions number theirs, 1 to 4."""
    if "gold" in row:
        return choice(row["query"].removeprefix("Question: "), row["choices"], row["gold"])
    labels = [_letter(label) for label in row["choices"]["label"]]
    options = dict(zip(labels, row["choices"]["text"], strict=True))
    return choice(row["question"], list(options.values()), labels.index(_letter(row["answerKey"])))


def _letter(label: str) -> str:
    return LETTERS[int(label) - 1] if label.isdigit() else label


def _data(config: str) -> DataSet:
    plain = config.lower().replace("-", "_")
    return DataSet(
        "arc",
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        hub={"train": f"{config}/train-*.parquet", "val": f"{config}/test-*.parquet"},
        local={
            "train": (f"{plain}/train*.*", f"{config}/train*.*"),
            "val": (f"{plain}/test*.*", f"{config}/test*.*", f"**/{plain}.jsonl"),
        },
    )


DATA = {config: _data(config) for config in ("ARC-Easy", "ARC-Challenge")}
EASY, CHALLENGE = (
    Task(name, "choice", 0.25, items_of(data, item), prompt, gold, is_answer)
    for name, data in DATA.items()
)
