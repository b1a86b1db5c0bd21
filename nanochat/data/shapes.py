"""
The shapes in which people keep conversations, all turned into the one of rendering.py:

    [{"role": ..., "content": ...}, ...]                 a list of messages (nanochat's CustomJSON)
    {"messages": [...]}, {"conversations": [...]}        OpenAI and others; ShareGPT with from/value
    {"prompt": ..., "response": ...}                     also completion, output or answer
    {"instruction": ..., "input": ..., "output": ...}    Alpaca; Dolly with context and response
    {"question": ..., "answer": ...}                     and "system" beside any of these
    {"question": ..., "choices": [...], "answer": "B"}   or a column per option: choice0, A, opa

Consecutive messages of one side become one, and a conversation that the assistant opens begins with
an empty message of the user. An assistant message with "weight": 0, "train": false or another mark
of MARKS is context: the model reads it and does not learn to say it. A mark on a row holds for all
of its messages. Calls of a calculator as OpenAI writes them, with their results,
become parts of the reply. Anything else (calls of other tools, pictures) is a UserError.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from itertools import groupby
from operator import itemgetter
from string import ascii_uppercase as LETTERS
from string import digits as DIGITS
from typing import Any, NamedTuple

from nanochat.base.common import UserError
from nanochat.base.strangers import shown
from nanochat.data.rendering import check_content, checked_messages, parts_of

Row = dict[str, Any]  # of a file; also a conversation, or one of its messages

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bard", "bing"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
LISTS = "messages", "conversations", "conversation", "dialog", "dialogue", "turns"
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
# (fields of the question, joined, all but the first optional), (alternative fields of the reply)
PAIRS = (
    (("prompt",), ("response", "completion", "output", "answer", "chosen")),
    (("instruction", "input", "context"), ("output", "response")),
    (("question", "context"), ("answer", "response")),
    (("input",), ("output",)),
    (("query",), ("response", "answer")),
)
USUAL_NAMES = {"instruction and output": "Alpaca", "instruction and response": "Dolly"}
# Multiple choice: a list of options, or columns such as choice0, option_1, opa or A
ASKED, OPTION_LISTS = ("question", "prompt", "query", "input", "problem"), ("choices", "options")
OPTION = re.compile(r"(?:(choices?|options?|opt?|ending)[ _-]?)?([a-z]|\d)")
ANSWERS = [
    "answer",
    "answerkey",
    "answer_key",
    "correct",
    "correct_answer",
    "correct_option",
    "label",
    "target",
]
LABELS = LETTERS.lower(), DIGITS, DIGITS[1:]  # of options: a, b, ... or from 0 or 1 on
CALCULATORS = "calculator", "calculate", "python"
# Marks, and the values with which a message or a row is not learned: 0 or false, 1 or true
MARKS = {
    **dict.fromkeys(("weight", "loss_weight", "loss", "train", "train_on_turn", "trainable"), 0),
    **dict.fromkeys(("mask", "masked"), 1),
}
SPELLINGS = ("0", "0.0", "false"), ("1", "1.0", "true")  # of 0 and 1 on rows, in lower case


class _Pair(NamedTuple):
    """A question and its reply, and the fields of the row that hold them."""

    question: str
    reply: str
    fields: set[str]


def shape_of(row: Any) -> str | None:
    """
    The shape of a row by its usual name ("messages", "ShareGPT", "Alpaca", "Dolly", "prompt and
    response" ...), or None if it is not a conversation.
    """
    if isinstance(row, list):
        return "lists of messages" if row and isinstance(row[0], dict) else None
    if not isinstance(row, dict):
        return None
    names = {str(name).lower() for name in row}
    if "prompt" in names and "message_tree_id" in names:
        return "OpenAssistant trees"
    if {"message_id", "parent_id", "role", "text"} <= names:
        return "OpenAssistant messages"
    for name in LISTS:
        if name in names:
            messages = row.get(name)
            first = messages[0] if isinstance(messages, list) and messages else None
            if isinstance(first, dict) and "from" in first:
                return "ShareGPT"
            return name if isinstance(messages, list) else None
    return _shape_of_question(names)


def _shape_of_question(names: set[str]) -> str | None:
    """The shape of a row with these fields, if it is a question and its reply."""
    options = _option_columns(names) or names.intersection(OPTION_LISTS)
    if options and names.intersection(ASKED) and names.intersection(ANSWERS):
        return "multiple choice"
    for (question, *_), replies in PAIRS:
        for reply in replies:
            if question in names and reply in names:
                shape = f"{question} and {reply}"
                return USUAL_NAMES.get(shape, shape)
    return None


def fields_of(row: Any) -> str:
    """The fields of a row in words, with those within others as post.body."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}"
    names = []
    for name, value in row.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
    return ", ".join([*names[:12], "..."] if len(names) > 12 else names) or "none"


def conversation(row: Any) -> Row:
    """
    A row as {"messages": [...]} with its other fields. Raises UserError if it has no known shape,
    or if user and assistant do not take turns.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise UserError(f"expected an object or a list of messages, got a {type(row).__name__}")
    rest = {name: value for name, value in row.items() if name not in (*LISTS, "system")}
    lists = [row[name] for name in LISTS if isinstance(row.get(name), list)]
    messages = lists[0] if lists else _messages_of_pair(row)
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    converted: list[Row] = []
    for i, message in enumerate(messages):
        converted.append(_tool_result(message, converted) or _message(i, message))
    if any(str(value).lower() in SPELLINGS[MARKS[name]] for name, value in _marks(row).items()):
        converted = [{**message, "weight": 0} for message in converted]
    item = {**rest, "messages": _merged(converted)}
    checked_messages(item)
    return item


def _tool_result(message: Any, earlier: list[Row]) -> Row | None:
    """
    A result of the calculator, as a part of the reply that `earlier` ends with; None for any other
    message.
    """
    if not isinstance(message, dict) or message.get("role") not in ("tool", "function"):
        return None
    parts = earlier[-1]["content"] if earlier else None
    if not isinstance(parts, list) or not any(part.get("type") == "python" for part in parts):
        return None
    return {**earlier[-1], "content": [{"type": "python_output", "text": message.get("content")}]}


def _call(i: int, call: Any) -> dict[str, str]:
    """A call of the calculator as a part of the reply; UserError for one of another tool."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    function = function if isinstance(function, dict) else {"name": function}
    name = str(function.get("name"))
    arguments: Any = function.get("arguments")
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    values = [*arguments.values()] if isinstance(arguments, dict) else []
    if name.lower() in CALCULATORS and len(values) == 1 and isinstance(values[0], str):
        return {"type": "python", "text": values[0]}
    raise UserError(
        f"message {i} calls a tool ({shown(name)}): only calls of a {CALCULATORS[0]} with one "
        "expression can be trained"
    )


def _messages_of_pair(row: Row) -> list[Row]:
    if pair := _pair_of(_lowered(row)):
        return [
            {"role": "user", "content": pair.question},
            {"role": "assistant", "content": pair.reply},
        ]
    raise UserError(
        'a conversation is a list of messages, an object with "messages", or one with a pair of '
        f'texts such as "prompt" and "response"; this one has {shown(", ".join(map(str, row)))}'
    )


def _lowered(row: Row) -> Row:
    return {str(name).strip().lower(): value for name, value in row.items()}


def _pair_of(row: Row) -> _Pair | None:
    """The pair of a row whose fields have names in lower case; None if it has none."""
    if choice := _choice_of(row):
        return choice
    for questions, replies in PAIRS:
        asked = [name for name in questions if isinstance(row.get(name), str)]
        replied = [name for name in replies if isinstance(row.get(name), str)]
        if asked[:1] == [questions[0]] and replied:
            question = "\n\n".join(row[name] for name in asked if row[name])
            return _Pair(question, row[replied[0]], {*asked, replied[0]})
    return None


def left_out(row: Any) -> list[str]:
    """The fields of a pair that hold something and are not used, for a note to the user."""
    if not isinstance(row, dict) or any(isinstance(row.get(name), list) for name in LISTS):
        return []
    row = _lowered(row)
    with suppress(UserError):
        if pair := _pair_of(row):
            unused = row.keys() - {"system", *MARKS} - pair.fields
            return [name for name in row if name in unused and row[name] not in (None, "", [])]
    return []


def with_options(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question: one option per line, followed directly by its letter."""
    lines = [f"- {' '.join(text.split())}={c}" for text, c in zip(options, LETTERS, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter alone."])


def _choice_of(row: Row) -> _Pair | None:
    """_pair_of for multiple choice. Raises UserError if the answer is not among the options."""
    asked = next((name for name in ASKED if isinstance(row.get(name), str)), None)
    options, used = _options(row)
    answers = [name for name in ANSWERS if row.get(name) is not None]
    if asked is None or not 1 < len(options) <= len(LETTERS) or not answers:
        return None
    listed = any(isinstance(row.get(field), list) for field in used)
    for name in answers:
        right = _option(options, row[name], listed)
        if right is not None:
            question = with_options(row[asked], [*options.values()])
            return _Pair(question, LETTERS[right], {asked, name, *used})
    if len(str(row[answers[0]])) > 2:
        return None  # a reply in words
    raise UserError(
        f"the {answers[0]} {shown(row[answers[0]])} is none of the options "
        f"{', '.join(options)}: give the label of one, or its text"
    )


def _options(row: Row) -> tuple[dict[str, str], set[str]]:
    """The options of a row by label, and the fields that hold them; empty if it has none."""
    for name in OPTION_LISTS:
        value = row.get(name)
        if isinstance(value, dict) and {"label", "text"} <= value.keys():  # ARC
            labels, texts = value["label"], value["text"]
            listed = isinstance(labels, list) and isinstance(texts, list)
            value = dict(zip(labels, texts, strict=False)) if listed else None
        elif isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
            return {str(label).lower(): text for label, text in value.items()}, {name}
    columns = _option_columns(row)
    filled = {label: name for label, name in columns.items() if row[name] not in (None, "")}
    return {label: str(row[name]) for label, name in filled.items()}, set(columns.values())


def _option_columns(names: Iterable[str]) -> dict[str, str]:
    """Label -> column, of columns of one name with labels as in LABELS; empty if there are none."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if column := OPTION.fullmatch(name):
            groups.setdefault(column[1] or "", {})[column[2]] = name
    for group in groups.values():
        labels = "".join(sorted(group))
        if len(labels) > 1 and any(sequence.startswith(labels) for sequence in LABELS):
            return dict(sorted(group.items()))
    return {}


def _option(options: Mapping[str, str], answer: Any, listed: bool) -> int | None:
    """The index of the option that an answer names by its label, its letter or its text."""
    labels, texts = [*options], [text.strip() for text in options.values()]
    letters = LETTERS[: len(labels)] if labels[0] in ("0", "1") else ""
    ways = [labels, [*letters.lower()], [text.lower() for text in texts]]
    name = str(answer).strip()
    # With a list of options, "3" is first of all the text of one, as in ["1", "2", "3"]
    if listed and isinstance(answer, str) and texts.count(name) == 1:
        return texts.index(name)
    name = name.lower()
    return next((names.index(name) for names in ways if names.count(name) == 1), None)


def _message(i: int, message: Any) -> Row:
    """Message i as {"role", "content"}, with "weight": 0 if it is masked. May raise UserError."""
    if not isinstance(message, dict):
        raise UserError(f"message {i}: expected an object with a role, got {shown(message)}")
    role = next((message[key] for key in ROLE_KEYS if key in message), None)
    known = ROLE_OF.get(str(role).lower())
    if known is None:
        raise UserError(
            f"message {i}: the role {shown(role)} is none of {', '.join(ROLE_OF)}; only the "
            "calculator's calls and results can be part of a reply"
        )
    content = next((message[key] for key in CONTENT_KEYS if key in message), None)
    calls = message.get("tool_calls") or message.get("function_call") or []
    calls = calls if isinstance(calls, list) else [calls]
    if calls:
        text = [{"type": "text", "text": content}] if content else []
        content = [*text, *(_call(i, call) for call in calls)]
    elif isinstance(content, list) and (
        known != "assistant" or all(isinstance(part, str) for part in content)
    ):
        content = _text_of_parts(i, content)
    check_content(i, known, content)
    plain = {"role": known, "content": content}
    return {**plain, "weight": 0} if _is_masked(i, message) else plain


def _is_masked(i: int, message: Row) -> bool:
    marks = _marks(message)
    for name, value in marks.items():
        if value not in (0, 1):  # which False and True equal
            raise UserError(
                f'message {i}: "{name}" must be 0 or 1, false or true, not {shown(value)}'
            )
    return any(value == MARKS[name] for name, value in marks.items())


def _marks(row: Row) -> Row:
    """The marks of a message or a row that are not null, with their names in lower case."""
    return {k: v for k, v in _lowered(row).items() if k in MARKS and v is not None}


def _text_of_parts(i: int, parts: list[Any]) -> str:
    """The text of OpenAI's list of parts."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "\n".join(map(str, texts))
    raise UserError(f"message {i}: only text can be trained on, not {shown(parts)}")


def _masked_parts(message: Row) -> list[Any]:
    """The parts of a message, each with "weight": 0 if the message has it."""
    parts = parts_of(message["content"])
    return [{**part, "weight": 0} for part in parts] if message.get("weight") == 0 else parts


def _merge(first: Row, second: Row) -> Row:
    """Two messages of one side as one."""
    a, b = first["content"], second["content"]
    texts = isinstance(a, str) and isinstance(b, str)
    if first.get("weight") == second.get("weight"):
        return {**first, "content": f"{a}\n\n{b}" if texts else [*parts_of(a), *parts_of(b)]}
    if texts and first.get("weight") == 0:  # the line break is not learned either
        first = {**first, "content": f"{a}\n\n"}
    elif texts:
        second = {**second, "content": f"\n\n{b}"}
    return {"role": first["role"], "content": [*_masked_parts(first), *_masked_parts(second)]}


def _merged(messages: list[Row]) -> list[Row]:
    """The messages with consecutive ones of a side merged; the user's is the first."""
    merged: list[Row] = []
    for role, group in groupby(messages, key=itemgetter("role")):
        if role == "system":
            merged += group
        else:
            merged.append(reduce(_merge, group))
    first = next((i for i, message in enumerate(merged) if message["role"] != "system"), None)
    if first is not None and merged[first]["role"] == "assistant":
        merged.insert(first, {"role": "user", "content": ""})
    return merged
