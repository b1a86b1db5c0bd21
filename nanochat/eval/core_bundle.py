"""
Reads the evaluation bundle of the CORE score: a folder with core.yaml (the tasks),
eval_meta_data.csv (the score of guessing, in percent) and eval_data/ (one .jsonl file per task).

Malformed data stops the evaluation with a message that names the file and line. A task without
data is reported as absent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanochat.base.common import UserError, decoded, user_path
from nanochat.base.strangers import mismatch, missing, read_bytes, shown
from nanochat.eval.tasks.data import Row, read

MOST_LISTING = 2**22  # bytes of core.yaml
MOST_OPTIONS = 256  # of a question
MOST_SHOTS = 100
# kind of task -> (the fields of a row that are texts, the one that is a list of options or "")
FIELDS = {
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), ""),
}
LISTING = {  # the form of core.yaml
    "icl_tasks": [
        {
            "label": str,
            "dataset_uri": str,
            "num_fewshot": (int, [int]),
            "icl_task_type": str,
            "continuation_delimiter": str,
        }
    ]
}

Entry = tuple[str, str, int, str, str]  # of core.yaml: name, data file, shots, kind, delimiter


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle, with its rows as in the file."""

    name: str
    kind: str  # one of FIELDS
    shots: int  # examples before the question
    delimiter: str  # between a question and its answer
    chance: float  # the score of guessing according to the bundle, 0 to 1
    rows: list[Row]

    def texts(self, row: Row) -> list[str]:
        """
        The texts of a row whose likelihoods are compared, each with its answer and without
        examples; only one in language modelling.
        """
        if self.kind == "multiple_choice":
            return [row["query"] + self.delimiter + choice for choice in row["choices"]]
        contexts = row["context_options"] if self.kind == "schema" else [row["context"].strip()]
        return [context + self.delimiter + row["continuation"] for context in contexts]


def load_bundle(directory: Path | str) -> tuple[list[CoreTask], list[str]]:
    """
    The tasks of a bundle, and the names of those without data. Raises UserError, which names the
    file, for anything else that is missing or malformed.
    """
    root = user_path(directory)
    listing, baselines = root / "core.yaml", root / "eval_meta_data.csv"
    data = root / "eval_data"
    for path in (listing, baselines, data):
        if not path.exists():
            raise UserError(
                f"there is no {path}: an evaluation bundle has core.yaml, eval_meta_data.csv and "
                "eval_data/"
            )
    chances = _read_chances(baselines)
    entries = _read_listing(listing)
    tasks, absent = [], []
    for name, uri, shots, kind, delimiter in entries:
        if name not in chances:
            raise UserError(
                f"{baselines} has no row for the task {name[:60]}: add its random baseline in "
                "percent"
            )
        path = data / uri
        try:
            exists = path.is_file()
            inside = path.resolve().is_relative_to(data.resolve())
        except (OSError, ValueError):  # the name is too long or has a zero byte
            exists = inside = False
        if not inside:
            raise UserError(
                f"{listing}: dataset_uri {shown(uri)} of {shown(name)} is no file in eval_data"
            )
        if exists:
            rows = _read_rows(path, kind)
            tasks.append(CoreTask(name, kind, shots, delimiter, chances[name], rows))
        else:
            absent.append(name)
    if not tasks:
        raise UserError(
            f"{data} has data for none of the {len(entries)} tasks: unpack the bundle again"
        )
    return tasks, absent


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a small file can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, as in *NAME: write the value itself")
        return super().compose_node(parent, index)


def _read_listing(path: Path) -> list[Entry]:
    """The entry of each task in core.yaml."""
    entries: list[Entry] = []
    try:
        listing = _PlainLoader(decoded(read_bytes(path, MOST_LISTING))).get_single_data()
        if fault := mismatch(listing, LISTING, "core.yaml") or missing(listing, ["icl_tasks"]):
            raise ValueError(fault)
        for entry in listing["icl_tasks"]:
            shots = entry["num_fewshot"]
            shots = shots[0] if isinstance(shots, list) else shots
            if shots > MOST_SHOTS:
                raise ValueError(f"num_fewshot is {shots:,}, more than {MOST_SHOTS}")
            uri, kind = entry["dataset_uri"], entry["icl_task_type"]
            delimiter = entry.get("continuation_delimiter", " ")
            entries.append((entry["label"], uri, shots, kind, delimiter))
    except (yaml.YAMLError, OSError, ValueError, LookupError, RecursionError) as e:
        why = shown(" ".join(str(e).split()), 200)
        raise UserError(
            f"{path} must have a list icl_tasks of label, dataset_uri, num_fewshot and "
            f"icl_task_type ({type(e).__name__}: {why})"
        ) from e
    for name, _, _, kind, _ in entries:
        if kind not in FIELDS:
            raise UserError(
                f"{path}: {shown(name)} has icl_task_type {shown(kind)}: use one of "
                f"{', '.join(FIELDS)}"
            )
    if len({name for name, *_ in entries}) < len(entries):
        raise UserError(f"{path} has two tasks with the same label: use different ones")
    return entries


def _read_chances(path: Path) -> dict[str, float]:
    """Name of a task -> the score of guessing, 0 to 1."""
    chances = {}
    for place, row in read(path):
        try:
            chance = float(row["Random baseline"]) / 100
            chances[row["Eval Task"]] = chance
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{place}: the columns Eval Task and Random baseline (in percent) are needed"
            ) from e
        if not 0 <= chance < 1:
            raise UserError(
                f"{place}: the random baseline is {chance:.0%}: it must be at least 0 and below "
                "100 %"
            )
    return chances


def _read_rows(path: Path, kind: str) -> list[Row]:
    """The rows of a task's data file. UserError if one is malformed, or if there are none."""
    rows = []
    for place, row in read(path):
        if problem := _problem(row, kind):
            raise UserError(f"{place}: {problem}; correct or delete the line")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: fetch the bundle again")
    return rows


def _problem(row: Row, kind: str) -> str:
    """What is wrong with a row of a task of this kind, or ""."""
    texts, options_field = FIELDS[kind]
    options: Any = row.get(options_field) if options_field else []
    is_list = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not is_list or (options_field and not 2 <= len(options) <= MOST_OPTIONS):
        return f"{options_field} must be a list of 2 to {MOST_OPTIONS:,} texts"
    for name in texts:
        if not isinstance(row.get(name), str):
            return f"{name} must be a text"
    answers = options if kind == "multiple_choice" else [row["continuation"]]
    if not all(answer.strip() for answer in answers):
        return "an answer is empty"
    gold = row.get("gold")
    if options and (type(gold) is not int or not 0 <= gold < len(options)):
        return f"gold is {shown(gold)}: it must be a number from 0 to {len(options) - 1}"
    return ""
