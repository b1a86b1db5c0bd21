"""
GSM8K (Cobbe et al. 2021, arXiv 2110.14168): sums told as stories. The calculations that the solutions are annotated with become calls of
the calculator; the answer follows ####. A reply without that mark, or with two answers, is wrong.
"""

import re
from decimal import Decimal
from typing import Any

from nanochat.chat.tools import calculate
from nanochat.eval.tasks.common import Item, Task, exchange, gold, prompt
from nanochat.eval.tasks.data import DataSet, items_of

DATA = DataSet(
    "gsm8k",
    "openai/gsm8k",
    "740312add88f781978c0658806c59bc2815b9866",
    hub={"train": "main/train-*.parquet", "val": "main/test-*.parquet"},
    local={"train": ("gsm8k/train.jsonl",), "val": ("gsm8k/test.jsonl",)},
)


def item(row: dict[str, Any]) -> Item:
    """A row {"question", "answer"} with <<48/2=24>> behind what the calculator is asked."""
    answer = number(row["answer"].rpartition("####")[2])
    if answer is None or "####" not in row["answer"]:
        raise ValueError("the answer must end with #### and a number")
    parts = []
    for i, text in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2 == 0:
            parts += [{"type": "text", "text": text}] if text else []
            continue
        expression = text.rpartition("=")[0]
        if (
            result := calculate(expression)
        ) is not None:  # as it will answer in a chat; what it would refuse stays plain text
            parts += [
                {"type": "python", "text": expression},
                {"type": "python_output", "text": result},
            ]
    return exchange(row["question"], parts, answer=str(answer))


def number(text: str) -> Decimal | None:
    """The one number that a text holds: "$1,234.00" is 1234. None where there is none or more than one."""
    found = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text.replace(",", "").replace("$", ""))
    return Decimal(found[0]) if len(found) == 1 else None


def evaluate(item: Item, reply: str) -> bool:
    """Whether every #### of a reply is followed, on its line, by the right number alone."""
    return {number(line) for line in re.findall(r"####([^\n]*)", reply)} == {
        Decimal(item["answer"])
    }


TASK = Task(
    "GSM8K", "generative", 0.0, items_of(DATA, item), prompt, gold, evaluate, max_tokens=512
)
