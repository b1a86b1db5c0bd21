"""
Safe reading of files that a stranger may have written: only regular files of a limited size, with
JSON or TOML of a limited depth, whose values have the expected types and ranges.
"""

import errno
import json
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from nanochat.base.common import decoded

MOST_BYTES = 2**26  # of a JSON file
MOST_TOML = 2**20
MOST_DEPTH = 64  # of lists and objects within one another
MOST_TEXT = 2**20  # characters of one text
LARGEST = 2**53  # whole numbers up to here are exact in every language that writes JSON


def open_regular(path: Path | str) -> BinaryIO:
    """
    Open a file to read bytes. Raises OSError for anything that is not a regular file: a pipe or a
    device may never end, or never begin.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(fd, "rb")


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. OSError if it is not regular, ValueError if it exceeds `most` bytes."""
    with open_regular(path) as file:
        # Not always `most`, which read() would allocate
        size = max(os.fstat(file.fileno()).st_size, 2**20)
        data = file.read(min(most, size) + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object names the same field twice")
    return values


def parse_json(data: bytes | str) -> Any:
    """
    The value of a JSON text. ValueError if it is not valid, if an object names a field twice, or if
    it is nested more than MOST_DEPTH deep, which could exhaust the stack of recursive functions.
    """
    try:
        value = json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [value for values in inner for value in values]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def read_json(path: Path | str, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file. OSError or ValueError, as read_bytes and parse_json."""
    return parse_json(read_bytes(path, most))


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file. OSError, or ValueError if it is invalid or nested too deep."""
    text = decoded(read_bytes(path, MOST_TOML))
    if any(line.partition("=")[0].count(".") > MOST_DEPTH for line in text.splitlines()):
        raise ValueError("it is nested too deep")  # keys of many parts take tomllib minutes
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def mismatch(value: Any, form: Any, name: str) -> str:
    """
    How `value` differs from `form`, in words; '' if it does not. A form is int (0 to LARGEST),
    float (a finite number), bool, str, None or object (anything); a tuple of forms, of which one
    must fit; [form], a list whose items fit; {str: form}, an object whose values fit; or
    {"name": form, ...}, an object whose fields of these names fit, if it has them. `name` is what
    the message calls the value.
    """
    if isinstance(form, tuple):
        faults = [mismatch(value, option, name) for option in form]
        return "" if "" in faults else faults[0]
    if isinstance(form, list):
        if not isinstance(value, list):
            return _unfit(name, "a list", value)
        return _first(mismatch(v, form[0], f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return _unfit(name, "an object", value)
        every = form.get(str)
        forms = dict.fromkeys(value, every) if str in form else form
        return _first(mismatch(value[k], forms[k], f"{name}.{k}") for k in forms if k in value)
    kind, fits = _KINDS[form]
    return "" if fits(value) else _unfit(name, kind, value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    object: ("anything", lambda value: True),
    None: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str) and len(value) <= MOST_TEXT),
    int: ("a whole number from 0 up", lambda value: type(value) is int and 0 <= value <= LARGEST),
    float: ("a finite number", is_number),
}


def shown(value: Any, most: int = 60) -> str:
    """A value as a message shows it: in one short line, without control characters."""
    text = repr(value if not isinstance(value, str) else value[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def _unfit(name: str, kind: str, value: Any) -> str:
    return f"{name[:100]} is {shown(value)}, not {kind}"


def _first(faults: Iterable[str]) -> str:
    return next(filter(None, faults), "")


def missing(value: dict[str, Any], names: Iterable[str]) -> str:
    """Which of these fields an object lacks, in words; '' if none."""
    absent = [name for name in names if name not in value]
    return f"it lacks {', '.join(absent)}" if absent else ""
