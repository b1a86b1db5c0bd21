"""
ARC (Clark et al. 2018, arXiv 1803.05457): science questions for grades 3 to 9, an easy set and a
challenging one.
"""

from nanochat.eval.tasks.common import LETTERS, Item, Task, choice, is_answer
from nanochat.eval.tasks.data import DataSet, Row


def item(row: Row) -> Item:
    """
    The item of a row in the layout of the hub, or of the CORE bundle. Options get new letters,
    because a few questions number theirs from 1.
    """
    if "gold" in row:
        return choice(row["query"].removeprefix("Question: "), row["choices"], row["gold"])
    # If two options have the same label, the last one counts
    options = dict(zip(map(_letter, row["choices"]["label"]), row["choices"]["text"], strict=True))
    return choice(
        row["question"], list(options.values()), list(options).index(_letter(row["answerKey"]))
    )


def _letter(label: str) -> str:
    """The letter of an option that is labelled by a letter or a number from 1."""
    return LETTERS[int(label) - 1] if label.isdigit() else label


def _data(config: str) -> DataSet:
    plain = config.lower().replace("-", "_")
    return DataSet(
        "arc",
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        item=item,
        hub={"train": f"{config}/train-*.parquet", "val": f"{config}/test-*.parquet"},
        local={
            "train": (f"{plain}/train*.*", f"{config}/train*.*"),
            "val": (f"{plain}/test*.*", f"{config}/test*.*", f"**/{plain}.jsonl"),
        },
    )


DATA = {config: _data(config) for config in ("ARC-Easy", "ARC-Challenge")}
EASY, CHALLENGE = (Task(name, "choice", 0.25, data.items, is_answer) for name, data in DATA.items())
