"""
CustomJSON: the user's own conversations, one JSON object per line, either {"messages": [{"role":
..., "content": ...}, ...]} or {"prompt": ..., "response": ...}. Every line is checked; the first
that is not a conversation stops the reading with its file and line.
"""

from collections.abc import Sequence
from pathlib import Path

from nanochat.base.common import UserError
from nanochat.data.rendering import checked_messages
from nanochat.eval.tasks.common import Item, exchange
from nanochat.eval.tasks.data import Row


def conversation(row: Row) -> Item:
    """A row as a conversation; UserError if it is not one."""
    if "messages" in row:
        checked_messages(row)
        return row
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise UserError(
            'a conversation is an object with "messages", or with the texts "prompt" and "response"'
        )
    return exchange(prompt, response)


def files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and all .jsonl files in the given folders."""
    return [
        file
        for path in paths
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
