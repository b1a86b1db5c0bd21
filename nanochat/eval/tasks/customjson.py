"""
CustomJSON: the user's own conversations, one per row, in any of the shapes that shapes.py knows.
Every row is checked; those that are not conversations are named together, with file and line.
"""

from typing import Any

from nanochat.data.rendering import checked_messages
from nanochat.data.shapes import as_conversation
from nanochat.eval.tasks.common import Item


def conversation(row: Any) -> Item:
    """A row as a conversation; UserError if it is not one."""
    item = as_conversation(row)
    checked_messages(item)
    return item
