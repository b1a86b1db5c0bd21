"""
Conversations from the user's files, in all the forms that people keep them in: rows (see
shapes.py), chats and dialogues in text or exports, trees (see dialogue.py), and archives of these.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError
from nanochat.data import dialogue
from nanochat.data.folders import ARCHIVES, CONVERSATIONS, PLAIN, TEXT_FIELDS, kind_of
from nanochat.data.readers import unpacked
from nanochat.data.rows import (
    BAD_ROW,
    MOST_COLLECTED,
    Report,
    Rows,
    TooManyBadRows,
    open_text,
    read_rows,
    reading,
)
from nanochat.data.shapes import Row, conversation, left_out, shape_of

LONGEST_CHAT = 1 << 28  # characters
NO_CONVERSATIONS = "holds no conversations"
ROWS_WITHOUT_CONVERSATIONS = 1000  # at the beginning of a file, which is then taken to have none
MOST_NOTES = 50  # different ones


def read(path: Path, report: Report, me: str | None = None, alone: bool = True) -> Rows:
    """
    Yield ("FILE, line N", row) for each conversation of a file. Given `me`, the person of that name
    is the assistant of a chat. If the file is the only one to read (`alone`), raises UserError if
    it has no conversations or cannot be read; else the report lists it as skipped.
    """
    try:
        yield from _read(path, report, me)
        with reading(path):  # it may be gone by now
            report.read[kind_of(path)] += 1
    except TooManyBadRows:
        raise
    except UserError as e:
        if alone:
            raise
        report.skip(path, e)


def _read(path: Path, report: Report, me: str | None) -> Rows:
    with reading(path):
        kind = kind_of(path)
        if kind in PLAIN:
            chats = _chats(path, report, me)
            if me and not chats:  # `me` writes in other files; this may be User and Assistant
                me, chats = None, _chats(path, Report(), None)
            if not chats:
                raise UserError(
                    f"{path} {NO_CONVERSATIONS}: lines must begin with User: and Assistant:, or "
                    "with names, of which --me says who is the assistant"
                )
            rows = dialogue.as_rows(chats, me, str(path))
            yield from ((f"{path}, chat {i}", row) for i, row in enumerate(rows, 1))
        elif kind in ARCHIVES:
            with unpacked(path, CONVERSATIONS, report) as files:
                for file in files:
                    for place, row in read(file, report, me, alone=False):
                        yield place.replace(str(file), f"{path}/{file.name}"), row
        else:
            yield from _rows(path, report, me)


def _chats(path: Path, report: Report, me: str | None) -> list[dialogue.Chat]:
    with open_text(path, report) as file:
        head = file.read(dialogue.HEAD)
        if dialogue.chats_in_text(head, me):
            return dialogue.chats_in_text(head + file.read(LONGEST_CHAT), me)
    return []


def _rows(path: Path, report: Report, me: str | None) -> Rows:
    messages: list[Row] = []  # of OpenAssistant, to be joined to trees
    for number, (place, row) in enumerate(read_rows(path, report)):
        shape, chats = shape_of(row), dialogue.exported(row)
        if number == 0 and not shape and not chats and _is_text(row):
            raise UserError(f"{path} holds text, not conversations: give it to base_train --data")
        if shape == "OpenAssistant messages":
            own, parent = row.get("message_id"), row.get("parent_id")
            if isinstance(own, str | int) and isinstance(parent, str | int | None):
                messages.append(row)
            else:
                report.bad_row(place, "its message_id or parent_id is neither text nor a number")
        elif shape == "OpenAssistant trees":
            yield from _tree(place, row.get("prompt"), report)
        elif chats:
            for i, conversation_row in enumerate(dialogue.as_rows(chats, me, place), 1):
                yield f"{place}, chat {i}", conversation_row
        else:
            unused = left_out(row)
            if unused and len(report.notes) < MOST_NOTES:
                report.notes[f"rows whose columns {', '.join(unused)[:200]} are not used"] += 1
            yield place, row
    for tree in dialogue.trees(messages):
        yield from _tree(f"{path}, message {tree['message_id']}", tree, report)


def _is_text(row: Any) -> bool:
    return isinstance(row, str) or (
        isinstance(row, dict) and not row.keys().isdisjoint(TEXT_FIELDS)
    )


def _tree(place: str, tree: Any, report: Report) -> Rows:
    try:
        yield from ((place, row) for row in dialogue.tree_conversations(tree))
    except BAD_ROW as e:
        report.bad_row(place, e)


def checked(row: Any) -> Row | Exception:
    """A row as a conversation whose turns are checked, or the exception that says what is wrong."""
    try:
        return conversation(row)
    except BAD_ROW as e:
        return e


def survey(path: Path, report: Report, me: str | None = None) -> Counter[str]:
    """
    Count the conversations of a file by shape. The report gets the problem of each row that is not
    a valid conversation. Empty for a file that holds no conversations, of which only the first
    ROWS_WITHOUT_CONVERSATIONS rows are read unless it is an archive.
    """
    counts: Counter[str] = Counter()
    earlier_problems, is_archive = len(report.problems), kind_of(path) in ARCHIVES
    meant = False  # whether anything in the file is meant as a conversation
    unused = 0
    try:
        for place, row in read(path, report, me):
            shape, outcome = shape_of(row), checked(row)
            meant = meant or shape is not None
            if isinstance(outcome, Exception):
                if len(report.problems) < report.limit + MOST_COLLECTED:
                    report.problems.append(f"{place}: {outcome}")
                unused += 1
            else:
                counts["chats" if ", chat " in place else shape or "messages"] += 1
            if unused >= ROWS_WITHOUT_CONVERSATIONS and not (meant or counts or is_archive):
                break
    except UserError as e:
        report.problems.append(str(e))
        meant = meant or isinstance(e, dialogue.NobodyIsAssistant)
    if not meant:
        del report.problems[earlier_problems:]
    return counts
