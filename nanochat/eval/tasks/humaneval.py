"""
HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to write, judged by running their tests in the sandbox of execution.py. The
problem is shown as it stands; a reply may repeat its imports and signature or give the body alone, fenced or plain.
"""

import ast
import re
from textwrap import indent
from typing import Any

from nanochat.eval import sandbox as execution
from nanochat.eval.tasks.common import Item, Task, exchange, gold, prompt
from nanochat.eval.tasks.data import DataSet, items_of

DATA = DataSet(
    "humaneval",
    "openai/openai_humaneval",
    "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    hub={"val": "openai_humaneval/test-*.parquet"},
    local={"val": ("humaneval/HumanEval.jsonl",)},
)


def item(row: dict[str, Any]) -> Item:
    """A row {"prompt", "canonical_solution", "test", "entry_point"}."""
    problem, solution, name = row["prompt"], row["canonical_solution"], row["entry_point"]
    if f"def {name}(" not in problem or "def check(" not in row["test"]:
        raise ValueError(f"the prompt must define {name}, and the test check")
    return exchange(problem, f"```python\n{problem}{solution}```", test=row["test"], function=name)


def program(item: Item, reply: str) -> str:
    """The problem, whose docstring makes it a whole function, and after it what a reply makes of it."""
    problem, name = item["messages"][0]["content"], item["function"]
    fenced = re.findall(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    defines = re.compile(rf"^(?:async )?def {name}\b", re.MULTILINE)
    code = next(filter(defines.search, fenced), fenced[0]) if fenced else reply
    if defines.search(code):
        if start := re.search(r"^(?:def|async def|class|import|from|@)", code, re.MULTILINE):
            code = code[start.start() :]  # what is said before it is no code
        return f"{problem}\n{code}"
    body = code.strip("\n")
    ways = (
        [body] if body[:1].isspace() else [indent(body, "    "), "    " + body]
    )  # not indented, or its first line alone is not
    return next((problem + way for way in ways if _parses(problem + way)), problem + body)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def evaluate(item: Item, reply: str) -> bool:
    """Whether the function passes its tests in the sandbox. UserError where there is none."""
    return execution.run(
        f"{program(item, reply)}\n{item['test']}\ncheck({item['function']})\n"
    ).passed


TASK = Task(
    "HumanEval",
    "generative",
    0.0,
    items_of(DATA, item),
    prompt,
    gold,
    evaluate,
    max_tokens=512,
    missing=execution.missing,
)
