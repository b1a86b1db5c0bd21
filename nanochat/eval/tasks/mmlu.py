"""
MMLU (Hendrycks et al. 2020, arXiv 2009.03300): questions on 57 subjects, from school to profession.
Training uses the auxiliary questions that its authors gathered from other tests, or the 285
questions of dev if the user's folder has only these.
"""

from nanochat.eval.tasks.common import Item, Task, choice, is_answer
from nanochat.eval.tasks.data import DataSet, Row


def item(row: Row) -> Item:
    """The item of a row as the hub has it, or of a csv file, which has one column per option."""
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
