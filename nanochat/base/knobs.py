"""
Command lines from dataclasses. Each field is a knob, a setting of a command, with its name, type,
default, help and bounds in one place. A value comes from the default, from a checkpoint
("inherited"), from a recipe file (TOML) or from the command line; later ones in this list have
precedence, and the origin of every value is recorded.

A mistake is a UserError, never a guess: an unknown flag, key or table (the message names the
nearest one), a value of the wrong type, or one out of bounds.
"""

import argparse
import dataclasses
import inspect
import re
import shlex
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from nanochat.base.commands import command_names, first_sentence, near
from nanochat.base.common import UserError, print0, user_path
from nanochat.base.strangers import read_toml, shown

T = TypeVar("T")
LARGEST_SEED = 2**63 - 1  # torch and numpy both accept seeds from 0 to this
TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


# The types of a value, or of each value of a list: (name in the help, name in messages, function
# that reads it from text and raises ValueError or KeyError)
KINDS = {
    int: ("N", "a whole number", int),
    float: ("X", "a number", float),
    str: ("TEXT", "some text", str),
    bool: ("", "true or false", lambda word: TRUTH[word.lower()]),
}


def knob(
    default: Any,
    help: str = "",
    *,
    alias: str = "",
    positional: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """
    One field of a command's dataclass: `depth: int = knob(20, "layers of the model", low=1)`.
    `alias` is a short flag such as "-p". `positional` lets the value stand without its flag, which
    one knob of a command may. `low` and `high` are inclusive bounds.
    The return type is Any, as that of dataclasses.field is.
    """
    metadata = {"help": help, "alias": alias, "positional": positional, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class ReadingKnobs:
    """Reading"""

    skip_bad_rows: int = knob(
        0, "rows per source of your own files that may be left out when they cannot be used", low=0
    )


@dataclasses.dataclass(kw_only=True)
class ConversationKnobs(ReadingKnobs):
    """Conversations"""

    name: str = knob("nanochat", "what the model calls itself in the identity conversations")
    me: str | None = knob(
        None, "person of your chats (WhatsApp, Telegram, Discord, text) who becomes the assistant"
    )


class _Knob:
    """One field of a dataclass of knobs, with its annotation taken apart."""

    def __init__(self, name: str, annotation: Any, default: Any, meta: Mapping[str, Any]):
        """`meta`: the arguments of knob()."""
        self.name, self.default, self.meta = name, default, meta
        kind, self.optional = annotation, NoneType in get_args(annotation)
        if self.optional:
            kind = next(t for t in get_args(kind) if t is not NoneType)
        self.many = get_origin(kind) is tuple  # tuple[kind, ...]
        kind = get_args(kind)[0] if self.many else kind
        self.choices = get_args(kind) if get_origin(kind) is Literal else ()
        self.kind = str if self.choices else kind  # of a value
        assert self.kind in KINDS, f"{name}: a knob cannot have the type {annotation}"

    @property
    def metavar(self) -> str:
        if self.choices:
            return "|".join(choice for choice in self.choices if choice)
        return "A B ..." if self.many else KINDS[self.kind][0]

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        words = KINDS[self.kind][1]
        if self.choices:
            words = "one of " + ", ".join(choice or "''" for choice in self.choices)
        elif self.many:
            words = f"one or more values, each {words}"
        return f"{words} or none" if self.optional else words

    def from_text(self, words: Sequence[str], where: str) -> Any:
        """The value of these words of a command line. `where`: the flag, for error messages."""
        if self.optional and [word.lower() for word in words] == ["none"]:
            return None
        try:
            values = [KINDS[self.kind][2](word) for word in words]
        except (ValueError, KeyError):
            self._refuse(" ".join(words), where)
        return self._checked(values, where)

    def from_data(self, value: Any, where: str) -> Any:
        """The value of TOML or JSON data, where "4" is text and not the number 4."""
        if self.optional and value in (None, "none"):  # TOML has no null
            return None
        if self.many != isinstance(value, list | tuple):
            self._refuse(value, where)
        values = value if self.many else [value]
        types = (int, float) if self.kind is float else (self.kind,)
        if not all(type(v) in types for v in values):  # exactly: isinstance(True, int)
            self._refuse(value, where)
        try:
            return self._checked([self.kind(v) for v in values], where)
        except OverflowError:  # a whole number that no float can hold
            self._refuse(value, where)

    def _checked(self, values: Sequence[Any], where: str) -> Any:
        low, high = self.meta["low"], self.meta["high"]
        for value in values:
            if self.choices and value not in self.choices:
                self._refuse(value, where)
            if low is not None and not value >= low:  # `not >=` also catches NaN
                raise UserError(f"{where} must be at least {low} (got {value})")
            if high is not None and not value <= high:
                raise UserError(f"{where} must be at most {high} (got {value})")
        return tuple(values) if self.many else values[0]

    def _refuse(self, value: Any, where: str) -> NoReturn:
        raise UserError(f"{where} must be {self.expected} (got {shown(value)})")


RECIPE = _Knob("recipe", str, "", knob("").metadata)  # a flag that every command has


def _knobs(cls: type) -> dict[str, _Knob]:
    hints = get_type_hints(cls)
    return {
        f.name: _Knob(f.name, hints[f.name], f.default, f.metadata)
        for f in dataclasses.fields(cls)
        if f.metadata  # others are no knobs
    }


def _positional(knobs: Mapping[str, _Knob]) -> _Knob | None:
    """The knob whose flag can be left out, if there is one."""
    return next((knob for knob in knobs.values() if knob.meta["positional"]), None)


# ---- the command line


def _is_flag(word: str) -> bool:
    """-p, --depth, --depth=4; but -1, -0.5, -1e-3, -inf and "- some text" are values."""
    return bool(re.match(r"(?!-(inf|nan)$)--?[A-Za-z][\w-]*(=|$)", word))


def _find(knobs: Mapping[str, _Knob], flag: str, command: str) -> tuple[_Knob, bool]:
    """(the knob that a flag sets, whether the flag is negated, as in --no-tie_embeddings)."""
    flags = {f"--{name}": knob for name, knob in knobs.items()}
    flags |= {knob.meta["alias"]: knob for knob in knobs.values() if knob.meta["alias"]}
    name = f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
    if name in flags:
        return flags[name], False
    positive = flags.get(name.replace("--no_", "--"))
    if positive and positive.kind is bool:
        return positive, True
    raise UserError(f"{command} has no flag {flag}{near(flag, flags)}; -h lists all flags")


def _read_flag(
    knobs: Mapping[str, _Knob], word: str, following: deque[str], command: str
) -> tuple[_Knob, str, list[str]]:
    """
    (knob, its flag, its values) of a word that is a flag; values that stand behind it are removed
    from the following words.
    """
    flag, equals, value = word.partition("=")
    knob, negated = _find(knobs, flag, command)
    if negated:
        if equals:
            raise UserError(f"{flag} takes no value: write {flag} or --{knob.name}={value}")
        return knob, flag, ["false"]
    values = [value] if equals else []
    if knob.kind is bool and not equals:
        explicit = following and following[0].lower() in (*TRUTH, "none")
        values = [following.popleft() if explicit else "true"]
    while following and not _is_flag(following[0]) and (knob.many or not values):
        values.append(following.popleft())
    if not values:
        raise UserError(f"{flag} needs a value: {knob.expected}")
    return knob, flag, values


def _read_command_line(
    knobs: Mapping[str, _Knob], argv: Sequence[str], command: str
) -> tuple[dict[str, Any], list[str]]:
    """({knob: value} of a command line, the recipe files that it names)."""
    known, place = {**knobs, "recipe": RECIPE}, _positional(knobs)
    words = deque(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun's separator
    given: dict[str, tuple[str, list[str]]] = {}  # name -> the flag as written, its values
    recipes: list[str] = []
    while words:
        word = words.popleft()
        if _is_flag(word):
            knob, flag, values = _read_flag(known, word, words, command)
        elif place and (place.many or place.name not in given):
            knob, flag, values = place, place.name, [word]
        else:
            raise UserError(
                f"{command} does not take the argument {word!r}: write a value after its flag, "
                "as in --flag VALUE; -h lists all flags"
            )
        if knob is RECIPE:
            recipes += values
        elif knob.many:  # the values of all its flags; "--data=" is none
            _, earlier = given.get(knob.name, ("", []))
            given[knob.name] = flag, [*earlier, *filter(None, values)]
        else:
            given[knob.name] = flag, values
    return {
        name: knobs[name].from_text(values, flag) for name, (flag, values) in given.items()
    }, recipes


# ---- recipe files


def _table(command: str) -> str:
    """The name of a command's table in a recipe: "plan_memory" for "plan memory"."""
    return command.rsplit(".", 1)[-1].replace(" ", "_")


def _read_toml(file: str) -> dict[str, Any]:
    try:
        return read_toml(user_path(file))
    except FileNotFoundError:
        raise UserError(
            f"there is no recipe file {file}: check the path given to --recipe"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the recipe file {file} ({e})") from None
    except ValueError as e:
        raise UserError(
            f"the recipe file {file} is not valid TOML ({e}): correct it there"
        ) from None


def _read_recipe(knobs: Mapping[str, _Knob], file: str, table: str) -> dict[str, Any]:
    """{knob: value} from the tables [all] and [table] of a recipe; [table] has precedence."""
    tables = _read_toml(file)
    known = {"all", table, *command_names()}
    for section, entries in tables.items():
        if not isinstance(entries, dict):
            raise UserError(
                f"{section} in {file} does not belong to a table: move it below a line [{table}]"
            )
        if section not in known and not section.startswith(tuple(f"{name}_" for name in known)):
            raise UserError(
                f"the table [{section}] in {file} does not name a "
                f"command{near(section, known)}: use [{table}] for this command, or [all]"
            )
    shared = _known_values(knobs, tables.get("all", {}), f"in [all] of {file}")
    own = _known_values(knobs, tables.get(table, {}), f"in [{table}] of {file}", strict=True)
    return {**shared, **own}


def _known_values(
    knobs: Mapping[str, _Knob], entries: Mapping[str, Any], where: str, strict: bool = False
) -> dict[str, Any]:
    """{knob: value} of the entries; one of another name is ignored or, if `strict`, an error."""
    values = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name in knobs:
            values[name] = knobs[name].from_data(value, f"{name} {where}")
        elif strict:
            raise UserError(
                f"{key} {where} is not a knob of this command{near(name, knobs)}; -h lists all"
            )
    return values


# ---- what commands call


def stored_values(cls: type, stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """
    {knob: value} for the knobs of `cls`, of what a file has stored or another command has, checked
    like a recipe; others are ignored. `where` names the source in error messages, as in "in the
    checkpoint".
    """
    return _known_values(_knobs(cls), stored, where)


def from_text(cls: type, name: str, text: str, where: str) -> Any:
    """
    The value that a person has typed for the knob `name` of `cls`, checked as on the command line.
    `where` names the knob in error messages. Raises UserError.
    """
    return _knobs(cls)[name].from_text([text], where)


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    command: str,
    description: str = "",
) -> tuple[T, dict[str, str]]:
    """
    An instance of `cls`, a flat dataclass of knobs, and the origin of each of its values:
    "default", "recipe FILE" or "command line". `argv` is sys.argv[1:] by default.
    `command` is its name, such as "base_train" or "plan memory"; their tables in a recipe are
    [base_train] and [plan_memory]. Names in [all] that `cls` lacks are ignored.

    -h prints the help and exits with status 0. The help starts with `description`, by default the
    first sentence of the module that defines `cls`. Raises UserError for every mistake.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    knobs = _knobs(cls)
    if {"-h", "--help"} & set(argv):
        print0(usage(cls, command=command, description=description))
        sys.exit(0)
    given, recipes = _read_command_line(knobs, argv, command)
    layers = [  # later ones have precedence
        ("default", {name: knob.default for name, knob in knobs.items()}),
        *((f"recipe {file}", _read_recipe(knobs, file, _table(command))) for file in recipes),
        ("command line", given),
    ]
    values, origins = {}, {}
    for origin, layer in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    return cls(**values), origins


def show(values: Any, origins: Mapping[str, str]) -> str:
    """A table of the values and their origins, those that are not defaults first."""
    rows = [
        (f.name, as_typed(getattr(values, f.name)), origins.get(f.name, "default"))
        for f in dataclasses.fields(values)
    ]
    rows.sort(key=lambda row: row[2] == "default")
    names, texts = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))  # widths
    return "\n".join(
        f"  {name:<{names}}  {text:<{min(texts, 40)}}  {origin}" for name, text, origin in rows
    )


def as_typed(value: Any) -> str:
    """A value as a person would type it after its flag."""
    if isinstance(value, tuple | list):
        return " ".join(shlex.quote(as_typed(one)) for one in value)
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ---- help


def usage(cls: type, *, command: str, description: str = "") -> str:
    """The help of a command, with a heading for each class that defines knobs, its own first."""
    knobs = _knobs(cls)
    place = _positional(knobs)
    argument = f" [{place.name.upper()}{' ...' if place.many else ''}]" if place else ""
    program = f"python -m {command}" if "." in command else f"nanochat {command}"
    page = argparse.ArgumentParser(  # which lays out the text, and does nothing else here
        usage=f"{program}{argument} [--flag VALUE ...] [--recipe FILE.toml]",
        description=description or first_sentence(sys.modules[cls.__module__].__doc__),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 33),
        add_help=False,
    )
    sections: dict[str, Any] = {}  # by heading
    for c in cls.__mro__:
        generated = (c.__doc__ or "").startswith(f"{c.__name__}(")  # by dataclass()
        heading = c.__name__ if generated else first_sentence(c.__doc__)
        section = sections.setdefault(heading, page.add_argument_group(heading))
        for name in inspect.get_annotations(c):
            if name in knobs:
                _explain(section, knobs.pop(name))
    section = page.add_argument_group("General")
    tables = f"[{_table(command)}] and [all]"
    section.add_argument("--recipe", metavar="FILE.toml", help=f"read values from {tables}")
    section.add_argument("-h, --help", action="store_true", help="show this help and exit")
    return page.format_help().rstrip()


def _explain(section: Any, knob: _Knob) -> None:
    """Add a knob to a section of the help."""
    flag = f"--[no-]{knob.name}" if knob.kind is bool else f"--{knob.name}"
    names = f"{knob.meta['alias']}, {flag}" if knob.meta["alias"] else flag
    told = knob.default in ("", ()) or "(default:" in knob.meta["help"]
    default = "" if told else f" [{as_typed(knob.default)}]"
    text = (knob.meta["help"] + default).strip().replace("%", "%%")
    section.add_argument(names, dest=knob.name, metavar=knob.metavar, help=text)
