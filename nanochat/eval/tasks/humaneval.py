"""
HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to write, judged by running their
tests in a sandbox. The problem is shown as published. A reply may repeat its imports and signature,
or give only the body, inside or outside a code block.
"""

import ast
import re
from textwrap import indent

from nanochat.eval import sandbox
from nanochat.eval.tasks.common import Item, Task, exchange
from nanochat.eval.tasks.data import DataSet, Row


def item(row: Row) -> Item:
    """A row {"prompt", "canonical_solution", "test", "entry_point"}."""
    problem, solution, name = row["prompt"], row["canonical_solution"], row["entry_point"]
    if f"def {name}(" not in problem or "def check(" not in row["test"]:
        raise ValueError(f"the prompt must define {name}, and the test must define check")
    return exchange(problem, f"```python\n{problem}{solution}```", test=row["test"], function=name)


def program(item: Item, reply: str) -> str:
    """
    The problem followed by the reply's code. The problem alone is a valid program: a function with
    only a docstring, which a definition in the reply replaces and a body in the reply completes.
    """
    problem, name = item["messages"][0]["content"], item["function"]
    fenced = re.findall(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    blocks = fenced or [reply]
    defines = re.compile(rf"^(?:async )?def {name}\b", re.MULTILINE)
    code = next(filter(defines.search, blocks), blocks[0])
    if defines.search(code):
        start = re.search(r"^(?:def|async def|class|import|from|@)", code, re.MULTILINE)
        prose = start.start() if start and not fenced else 0
        return f"{problem}\n{code[prose:]}"
    body = code.strip("\n")
    if body[:1].isspace():
        return problem + body
    # Either nothing is indented, or everything except the first line
    programs = [problem + indent(body, "    "), f"{problem}    {body}"]
    return next(filter(_parses, programs), problem + body)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def evaluate(item: Item, reply: str) -> bool:
    """Whether the function passes its tests in the sandbox; UserError if there is no sandbox."""
    problem = item["messages"][0]["content"]
    code = program(item, reply)
    return sandbox.judge(code, item["function"], problem, item["test"]).passed


DATA = DataSet(
    "humaneval",
    "openai/openai_humaneval",
    "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    item=item,
    hub={"val": "openai_humaneval/test-*.parquet"},
    local={"val": ("humaneval/HumanEval.jsonl",)},
)
TASK = Task(
    "HumanEval",
    "generative",
    0.0,
    DATA.items,
    evaluate,
    max_tokens=512,
    missing=sandbox.missing,
)
