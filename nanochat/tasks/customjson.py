"""
CustomJSON: the user's own conversations, one JSON object a line, {"messages": [{"role": ..., "content": ...}, ...]}.

Every line is checked; the first one that is no conversation stops the reading, named by file and line.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.tokenizer import checked_messages

VALIDATION_SHARE = 0.02


def conversations(paths: Sequence[Path], split: str) -> Iterator[dict[str, Any]]:
    """The conversations of .jsonl files (or folders of them) that fall to a split; where a line falls is decided by its content."""
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            for conversation, line in read(file):
                share = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=4).digest(), "big") / 2**32
                if (share < VALIDATION_SHARE) == (split == "val"):
                    yield conversation


def read(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every conversation of a file with its line. UserError naming file and line for the first that is malformed."""
    try:
        with open(file, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield _conversation(line, f"{file}, line {number}"), line
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {file} ({e}): conversations are UTF-8 text, one JSON object a line") from e


def _conversation(line: str, place: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as e:
        raise UserError(f"{place}: this is not JSON ({e}); mend or delete the line") from e
    if not isinstance(data, dict) or "messages" not in data:
        raise UserError(f'{place}: a conversation is an object with "messages"; mend or delete the line')
    try:
        checked_messages(data)
    except (UserError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{place}: {e}; mend or delete the line") from e
    return data
