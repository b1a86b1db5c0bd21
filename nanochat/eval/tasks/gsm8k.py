"""
GSM8K (Cobbe et al. 2021, arXiv 2110.14168): arithmetic word problems. The calculations annotated in
the solutions become calls of the calculator; the answer follows ####. A reply without that mark, or
with two different answers, is wrong.
"""

import re
from decimal import Decimal

from nanochat.chat.tools import calculate
from nanochat.eval.tasks.common import Item, Task, exchange
from nanochat.eval.tasks.data import DataSet, Row


def item(row: Row) -> Item:
    """
    The item of a row {"question", "answer"}, whose answer has <<48/2=24>> after a calculation.
    Raises ValueError unless it ends with #### and a number.
    """
    _, mark, answer = row["answer"].rpartition("####")
    result = number(answer)
    if not mark or result is None:
        raise ValueError("the answer must end with #### and a number")
    parts = []
    for i, text in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2 == 0:
            parts.append({"type": "text", "text": text})
            continue
        expression = text.rpartition("=")[0]
        output = calculate(expression)  # as in a chat
        if output is not None:  # what the calculator refuses stays plain text
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": output})
    parts = [part for part in parts if part["text"]]
    return exchange(row["question"], parts, answer=str(result))


def number(text: str) -> Decimal | None:
    """The one number in a text: "$1,234.00" is 1234. None if there is none or more than one."""
    numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text.replace(",", "").replace("$", ""))
    return Decimal(numbers[0]) if len(numbers) == 1 else None


def evaluate(item: Item, reply: str) -> bool:
    """Whether a reply has ####, and the right number alone follows it on every line that has it."""
    answers = {number(line) for line in re.findall(r"####([^\n]*)", reply)}
    return answers == {Decimal(item["answer"])}


DATA = DataSet(
    "gsm8k",
    "openai/gsm8k",
    "740312add88f781978c0658806c59bc2815b9866",
    item=item,
    hub={"train": "main/train-*.parquet", "val": "main/test-*.parquet"},
    local={"train": ("gsm8k/train.jsonl",), "val": ("gsm8k/test.jsonl",)},
)
TASK = Task("GSM8K", "generative", 0.0, DATA.items, evaluate, max_tokens=512)
