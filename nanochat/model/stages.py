"""The stages of training, in order, and the folders of their runs. Imports no torch."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.base.common import UserError, base_dir, notice


class Stage(NamedTuple):
    """One stage of training."""

    command: str  # the command that trains it
    chats: bool  # whether its models answer chat messages, or only continue text


STAGES: dict[str, Stage] = {  # by the name of their folder under checkpoints/
    "base": Stage("base_train", chats=False),
    "mid": Stage("mid_train", chats=True),
    "sft": Stage("chat_sft", chats=True),
    "rl": Stage("chat_rl", chats=True),
}


def stage_directory(stage: str) -> Path:
    """The folder with all runs of a stage."""
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
    return base_dir() / "checkpoints" / stage


def run_directory(stage: str, tag: str) -> Path:
    """The folder of the run with this tag, whether it exists or not."""
    if not re.fullmatch(r"[\w-][\w.-]*", tag):
        raise UserError(
            f"the model tag {tag!r} cannot be a folder name: "
            "use letters, digits, dashes, underscores and, except at the start, dots"
        )
    return stage_directory(stage) / tag


def lock_file(run: Path) -> Path:
    """The file that a process locks while it trains in the folder of a run."""
    return run.with_name(f".{run.name}.lock")


def split_name(name: str) -> tuple[str, str]:
    """
    The stage and the tag that a person means with STAGE, TAG, STAGE/TAG or TAG/STAGE: "auto" for
    the stage and "" for the tag where the name leaves them out.
    """
    first, slash, second = name.strip().partition("/")
    if first in (*STAGES, "auto"):
        return first, second
    if not slash:
        return "auto", first
    if second not in STAGES:
        raise UserError(
            f"there is no stage in {name!r}: write STAGE/TAG, with one of {', '.join(STAGES)}"
        )
    return second, first


def step_folders(run: Path) -> list[Path]:
    """The folders of the checkpoints in a run's folder, oldest first, including damaged ones."""
    folders = (p for p in run.glob("step_*") if p.is_dir() and re.fullmatch("step_[0-9]+", p.name))
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def was_set_aside(run: Path) -> bool:
    """Whether this is the folder of an older run, which another run with its tag replaced."""
    return re.fullmatch(r"\.old\d*", run.suffix) is not None


def saved_last(run: Path) -> tuple[bool, float]:
    """A key that sorts runs by the time of their last save, those that were set aside first."""
    times = [0.0]
    for folder in step_folders(run):
        with suppress(FileNotFoundError):  # a run that saves has deleted it
            times.append(folder.stat().st_mtime)
    return not was_set_aside(run), max(times)


def one_chain(
    logs: Mapping[str, list[dict[str, Any]]], tag: str, quiet: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """
    Of the logbooks of a tag, stage -> rows in the order of training, those that belong to one model
    and its stages. Left out are stages of an earlier model, because a stage before them was begun
    later, and stages that a later one did not start from. Unless `quiet`, a notice names them.
    """
    chain: dict[str, list[dict[str, Any]]] = {}
    begun: dict[str, float] = {}  # stage -> when it was begun
    for stage, rows in logs.items():
        start = next((row for row in rows if row["kind"] == "start"), {})
        knobs, began = start.get("config", {}).get("knobs"), 0.0  # not known
        with suppress(ValueError):
            began = datetime.fromisoformat(str(start.get("time"))).timestamp()
        source = knobs.get("source") if isinstance(knobs, dict) else None
        before = begun.get(source or "", max(begun.values(), default=0.0))
        if source in [name for name in logs if name not in chain] or 0 < began < before:
            continue
        earlier, begun[stage] = list(chain), began
        if source in earlier:
            chain = {name: chain[name] for name in earlier[: earlier.index(source) + 1]}
        chain[stage] = rows
    left_out = [f"{stage}/{tag}" for stage, rows in logs.items() if rows and stage not in chain]
    if left_out and not quiet:
        notice(
            f"left out are stages that do not belong to the present model {tag}, because an "
            f"earlier stage was trained again or a later one skipped them: {', '.join(left_out)}"
        )
    return chain


def by_preference(tag: str = "", stage: str = "auto") -> Iterator[tuple[str, Path]]:
    """
    (stage, folder) of every run, or of those with this tag or of this stage, in the order in which
    commands prefer them: the furthest stage of the tag saved last comes first.
    """
    runs: dict[str, dict[str, Path]] = {}  # tag -> stage -> folder
    for name in reversed(STAGES) if stage == "auto" else [stage]:
        folders = [run_directory(name, tag)] if tag else stage_directory(name).glob("*")
        for run in folders:
            runs.setdefault(run.name, {})[name] = run
    by_age = sorted(runs.values(), key=lambda stages: max(map(saved_last, stages.values())))
    for stages in reversed(by_age):
        yield from stages.items()
