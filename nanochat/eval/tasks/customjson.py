"""
CustomJSON: the user's own conversations, one JSON object a line, {"messages": [{"role": ..., "content": ...}, ...]} or
{"prompt": ..., "response": ...}. Every line is checked; the first that is no conversation stops the reading, named by file and line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError
from nanochat.data.rendering import checked_messages
from nanochat.eval.tasks.common import Item, exchange


def conversation(row: dict[str, Any]) -> Item:
    """A row as a conversation. UserError if it is none."""
    if "messages" in row:
        checked_messages(row)
        return row
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
        raise UserError(
            'a conversation is an object with "messages", or with the texts "prompt" and "response"'
        )
    return exchange(row["prompt"], row["response"])


def files(paths: Sequence[Path]) -> list[Path]:
    """The .jsonl files that files and folders name."""
    return [
        file
        for path in paths
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
