"""
MMLU (Hendrycks et al. 2020, arXiv 2009.03300): 57 subjects from school to profession. It trains on
the auxiliary questions that its authors gathered from other tests; a folder without them gives the
285 of dev.
"""

from nanochat.eval.tasks.common import Item, Task, choice, is_answer
from nanochat.eval.tasks.data import DataSet, Row


def item(row: Row) -> Item:
    """A row in the layout of the hub, or of a csv file, which has one column per option."""
    options = row["choices"] if "choices" in row else [row[f"choice{i}"] for i in range(4)]
    return choice(row["question"], options, int(row["answer"]))


DATA = DataSet(
    "mmlu",
    "cais/mmlu",
    "c30699e8356da336a370243923dbaf21066bb9fe",
    item=item,
    hub={"train": "all/auxiliary_train-*.parquet", "val": "all/test-*.parquet"},
    local={"train": ("mmlu/auxiliary_train/*.csv", "mmlu/dev/*.csv"), "val": ("mmlu/test/*.csv",)},
)
TASK = Task("MMLU", "choice", 0.25, DATA.items, is_answer)
