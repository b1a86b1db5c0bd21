"""
A command's dataclass becomes its command line: one field is one knob, with its name, default and help in one place. A value comes
from the default, what a checkpoint hands down, a recipe file (TOML) or the command line, the later winning, and its origin is kept.

It refuses to guess: an unknown or misspelt flag, key or table, a value of the wrong type or out of range is a UserError that names the
near miss. Dataclasses are flat; nesting belongs to inheritance, and each class of the ancestry is a heading in the help.
"""

import dataclasses
import difflib
import inspect
import re
import shutil
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanochat.base.common import UserError, notice, print0

T = TypeVar("T")
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def knob(
    default: Any,
    help: str = "",
    *,
    alias: str = "",
    positional: bool = False,
    low: float | None = None,
    high: float | None = None,
    was: str = "",
) -> Any:
    """
    One field of a command's dataclass: `depth: int = knob(20, "layers of the model", low=1)`. `alias` is a short flag such as "-p";
    `positional` lets the value stand without its flag; `low` and `high` are inclusive bounds; `was` is a former name, which
    still works on the command line, in recipes and in checkpoints, with a notice. Typed Any, as dataclasses.field is.
    """
    meta = {
        "help": help,
        "alias": alias,
        "positional": positional,
        "low": low,
        "high": high,
        "was": was,
    }
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class _Knob:
    name: str
    type: Any  # as annotated, X | None included
    default: Any
    meta: Mapping[str, Any]

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def core(self) -> Any:
        """The type without `| None`."""
        if typing.get_origin(self.type) not in (typing.Union, types.UnionType):
            return self.type
        kinds = [t for t in typing.get_args(self.type) if t is not type(None)]
        return kinds[0] if len(kinds) == 1 else self.type

    @property
    def many(self) -> bool:
        return typing.get_origin(self.core) is tuple

    def wants(self) -> str:
        """What a value must be, in words."""
        if typing.get_origin(self.core) is Literal:
            words = "one of " + ", ".join(str(v) or "''" for v in typing.get_args(self.core))
        elif self.many:
            words = "a list"
        else:
            words = {
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                str: "a text",
            }.get(self.core, str(self.core))
        return words + (" or none" if self.optional else "")

    def metavar(self) -> str:
        if typing.get_origin(self.core) is Literal:
            return "|".join(str(v) for v in typing.get_args(self.core) if v != "")
        return (
            "A B ..."
            if self.many
            else {int: "N", float: "X", bool: "", str: "TEXT"}.get(self.core, "VALUE")
        )

    def from_text(self, words: Sequence[str], where: str) -> Any:
        """The value that these words of a command line spell."""
        if self.optional and len(words) == 1 and words[0].lower() == "none":
            return None
        if self.core is bool:  # tyro would read any other word as False
            if words[0].lower() not in TRUE + FALSE:
                raise UserError(f"{where} takes {self.wants()}, not {words[0]!r}")
            return words[0].lower() in TRUE
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(self.core, set()))
        assert isinstance(spec, PrimitiveConstructorSpec), (
            f"{self.name}: knobs cannot read {self.type}"
        )
        try:
            value = spec.instance_from_str(list(words))
        except ValueError:
            raise UserError(f"{where} takes {self.wants()}, not {' '.join(words)!r}") from None
        return self.bounded(value, where)

    def from_data(self, value: Any, where: str) -> Any:
        """The value that a recipe or a checkpoint holds; "4" is not 4."""
        if self.optional and value == "none":  # TOML has no null
            return None
        try:
            value = TypeAdapter(self.type).validate_python(
                tuple(value) if isinstance(value, list) else value, strict=True
            )
        except ValidationError:
            raise UserError(f"{where} takes {self.wants()}, not {value!r}") from None
        return self.bounded(value, where)

    def bounded(self, value: Any, where: str) -> Any:
        low, high = self.meta.get("low"), self.meta.get("high")
        for v in value if isinstance(value, tuple) else (value,):
            if (
                isinstance(v, int | float) and low is not None and not v >= low
            ):  # `not >=` also catches NaN
                raise UserError(f"{where} must be at least {low}, not {v}")
            if isinstance(v, int | float) and high is not None and not v <= high:
                raise UserError(f"{where} must be at most {high}, not {v}")
        return value


def _knobs(cls: type) -> dict[str, _Knob]:
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    for f in fields:
        assert f.default is not dataclasses.MISSING, f"{cls.__name__}.{f.name} needs a default"
    return {f.name: _Knob(f.name, hints[f.name], f.default, f.metadata) for f in fields}


def _renamed(knobs: Mapping[str, _Knob], name: str, where: str) -> str:
    """The present name of a knob that used to be called `name`, with a notice; else `name`."""
    for knob in knobs.values():
        if name and name == knob.meta.get("was"):
            if where:
                notice(f"{name} {where} is now called {knob.name}")
            return knob.name
    return name


def near(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' when one of the names is close to this one, else ''."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _is_flag(word: str) -> bool:
    """-p, --depth, --depth=4; but -1, -0.5, -1e-3 and a text that happens to begin with a dash are values."""
    return re.match(r"--?[A-Za-z][\w-]*(=|$)", word) is not None and not re.fullmatch(
        r"-(inf|nan)", word
    )


def _read_argv(
    knobs: Mapping[str, _Knob], argv: Sequence[str], command: str
) -> tuple[dict[str, Any], list[str]]:
    """-> values given on the command line, and the recipe files named there."""
    short = {k.meta["alias"]: k.name for k in knobs.values() if k.meta.get("alias")}
    places = [k for k in knobs.values() if k.meta.get("positional")]
    words = list(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun's separator
    given: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    recipes: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not _is_flag(word):
            place = next((k for k in places if k.many or k.name not in given), None)
            if place is None:
                example = next(iter(knobs), "recipe")
                raise UserError(
                    f"{command} does not understand {word!r}: a value follows its flag, as in --{example} VALUE"
                )
            given.setdefault(place.name, []).append(word)
            where[place.name] = place.name
            continue
        flag, equals, value = word.partition("=")
        name = short.get(flag, flag.lstrip("-").replace("-", "_") if flag.startswith("--") else "")
        name = _renamed(knobs, name, "on the command line")
        if name.startswith("no_"):
            name = "no_" + _renamed(knobs, name[3:], "on the command line")
        negated = (
            name not in knobs
            and name.startswith("no_")
            and name[3:] in knobs
            and knobs[name[3:]].core is bool
        )
        if name == "recipe":
            if not equals and (at == len(words) or _is_flag(words[at])):
                raise UserError("--recipe needs the path of a TOML file after it")
            recipes.append(value if equals else words[at])
            at += not equals
            continue
        if negated:
            if equals:
                raise UserError(f"{flag} takes no value: write {flag} or --{name[3:]}={value}")
            name, value, equals = name[3:], "false", "="
        if name not in knobs:
            known = [*short, *(f"--{n}" for n in (*knobs, "recipe"))]
            raise UserError(f"{command} has no flag {flag}{near(flag, known)}; -h lists them all")
        k = knobs[name]
        taken = [value] if equals else []
        if k.core is bool and not equals:
            follows = at < len(words) and words[at].lower() in TRUE + FALSE + (
                ("none",) if k.optional else ()
            )
            taken = [words[at] if follows else "true"]
            at += follows
        elif k.many:
            while at < len(words) and not _is_flag(words[at]):
                taken.append(words[at])
                at += 1
        elif not equals and at < len(words) and not _is_flag(words[at]):
            taken = [words[at]]
            at += 1
        if not taken:
            raise UserError(f"{flag} needs a value after it: {k.wants()}")
        given[name] = given.get(name, []) + taken if k.many else taken
        where[name] = flag
    return {
        n: knobs[n].from_text([] if knobs[n].many and ws == [""] else ws, where[n])
        for n, ws in given.items()
    }, recipes


def _table(command: str) -> str:
    """The recipe table of a command."""
    return command.rsplit(".", 1)[-1].replace(" ", "_")


def _commands() -> set[str]:
    """The commands that there are: a recipe may hold a table for each."""
    return {p.stem for p in (Path(__file__).parent.parent / "commands").glob("*.py")} - {"__init__"}


def _read_recipe(knobs: Mapping[str, _Knob], file: str, table: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe file {file}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the recipe file {file} ({e})") from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"the recipe file {file} is not valid TOML: {e}") from None
    found: dict[str, Any] = {}
    known = {"all", table} | _commands()
    for name, entries in tables.items():
        if not isinstance(entries, dict):
            raise UserError(
                f"{name} in {file} stands outside a table: move it under [{table}] or [all]"
            )
        if name not in known and not any(
            name.startswith(f"{k}_") for k in known
        ):  # [plan_memory] belongs to plan
            raise UserError(f"{file} has a table [{name}] that is no command{near(name, known)}")
        for key, value in entries.items() if name in ("all", table) else ():
            key = _renamed(knobs, key.replace("-", "_"), f"in {file}")
            if key in knobs:
                if name == table or key not in tables.get(table, {}):
                    found[key] = knobs[key].from_data(value, f"{key} in [{name}] of {file}")
            elif name == table:
                raise UserError(
                    f"[{name}] of {file} sets {key}, which {table} does not have{near(key, knobs)}"
                )
    return found


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    command: str,
    inherited: Mapping[str, Any] | None = None,
    description: str = "",
) -> tuple[T, dict[str, str]]:
    """
    The knobs of `cls` (a flat dataclass) from `inherited`, --recipe files and `argv` (sys.argv when None), and where each came from:
    "default", "inherited", "recipe FILE" or "command line". Names in `inherited` and in a recipe's [all] that `cls` lacks are passed
    over. `command` is "base_train", a module such as "nanochat.report", or "plan memory"; the recipe tables of these are [base_train],
    [report] and [plan_memory].
    -h prints the help, which opens with `description` or the first sentence of the module that defines `cls`, and exits with status 0.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    knobs = _knobs(cls)
    if any(a in ("-h", "--help") for a in argv):
        print0(usage(cls, command=command, description=description))
        sys.exit(0)
    given, recipes = _read_argv(knobs, argv, command)
    values: dict[str, Any] = {k.name: k.default for k in knobs.values()}
    origins = dict.fromkeys(values, "default")
    layers = [
        (
            {
                n: knobs[n].from_data(v, f"{n} of the checkpoint")
                for old, v in (inherited or {}).items()
                if (n := _renamed(knobs, old, "")) in knobs
            },
            "inherited",
        )
    ]
    layers += [(_read_recipe(knobs, file, _table(command)), f"recipe {file}") for file in recipes]
    for layer, origin in [*layers, (given, "command line")]:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    return cls(**values), origins


def flags(cls: type) -> dict[str, str]:
    """Every flag of a command with its type and default in words: what the test of frozen flags compares."""
    return {
        n: f"{k.type.__name__ if type(k.type) is type else k.type} = {k.default!r}"
        for n, k in _knobs(cls).items()
    }


def first_sentence(doc: str | None) -> str:
    """The first sentence of a docstring without its full stop; '' when there is none."""
    return re.split(r"\.(?:\s|$)|:$", " ".join((doc or "").split("\n\n")[0].split()), maxsplit=1)[0]


def _text(value: Any) -> str:
    """A value as a person would write it after its flag."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return (
        " ".join(map(_text, value))
        if isinstance(value, tuple)
        else f"{value:.10g}"
        if isinstance(value, float)
        else str(value)
    )


def usage(cls: type, *, command: str, description: str = "") -> str:
    """The help of a command, one heading for each class that a knob was defined in, the command's own first."""
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 130))
    knobs = _knobs(cls)
    places = "".join(
        f" [{k.name.upper()}{' ...' if k.many else ''}]"
        for k in knobs.values()
        if k.meta.get("positional")
    )
    program = command if "." in command else f"scripts.{command}"
    lines = [f"usage: python -m {program}{places} [--flag VALUE ...] [--recipe FILE.toml]"]
    description = description or first_sentence(sys.modules[cls.__module__].__doc__)
    lines += ["", *textwrap.wrap(" ".join(description.split()), width)] if description else []

    def entry(left: str, right: str) -> None:
        wrapped = textwrap.wrap(right, width - 33) or [""]
        if len(left) > 29:
            lines.append(f"  {left}")
            left = ""
        lines.extend(
            f"  {left if i == 0 else '':29}  {part}".rstrip() for i, part in enumerate(wrapped)
        )

    owner = {n: c for c in reversed(cls.__mro__) for n in inspect.get_annotations(c)}
    for c in cls.__mro__:
        mine = [k for k in knobs.values() if owner[k.name] is c]
        if not mine:
            continue
        words = (
            c.__doc__ or ""
        ).strip()  # dataclass() writes "Name(field: ...)" where there is no docstring
        lines += [
            "",
            (
                c.__name__
                if words.startswith(f"{c.__name__}(")
                else first_sentence(words) or c.__name__
            )
            + ":",
        ]
        for k in mine:
            left = f"--[no-]{k.name}" if k.core is bool else f"--{k.name} {k.metavar()}"
            default = f" [{_text(k.default)}]" if k.default not in ("", ()) else ""
            entry(
                f"{k.meta['alias']}, {left}" if k.meta.get("alias") else left,
                (k.meta.get("help", "") + default).strip(),
            )
    lines.append("")
    entry(
        "--recipe FILE.toml",
        f"take values from its tables [{_table(command)}] and [all]; flags win over it",
    )
    entry("-h, --help", "show this and stop")
    return "\n".join(lines)


def show(values: Any, origins: Mapping[str, str]) -> str:
    """A table of the values and where they came from, those that are not defaults first."""
    rows = [
        (f.name, _text(getattr(values, f.name)), origins.get(f.name, "default"))
        for f in dataclasses.fields(values)
    ]
    rows.sort(key=lambda row: row[2] == "default")
    name, value = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    return "\n".join(f"  {n:<{name}}  {v:<{min(value, 40)}}  {origin}" for n, v, origin in rows)
