"""
MMLU (Hendrycks et al. 2020, arXiv 2009.03300): 57 subjects from school to profession. Its training questions are the auxiliary ones that
its authors gathered from other tests; a folder without them gives the 285 of dev.
"""

from typing import Any

from nanochat.eval.tasks.common import Item, Task, choice, gold, is_answer, prompt
from nanochat.eval.tasks.data import DataSet, items_of

DATA = DataSet(
    "mmlu",
    "cais/mmlu",
    "c30699e8356da336a370243923dbaf21066bb9fe",
    hub={"train": "all/auxiliary_train-*.parquet", "val": "all/test-*.parquet"},
    local={"train": ("mmlu/auxiliary_train/*.csv", "mmlu/dev/*.csv"), "val": ("mmlu/test/*.csv",)},
)


def item(row: dict[str, Any]) -> Item:
    """A row of the hub's layout, or of a csv file's, which has a column an option."""
    options = row["choices"] if "choices" in row else [row[f"choice{i}"] for i in range(4)]
    return choice(row["question"], options, int(row["answer"]))


TASK = Task("MMLU", "choice", 0.25, items_of(DATA, item), prompt, gold, is_answer)
