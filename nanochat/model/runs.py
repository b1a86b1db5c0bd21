"""
The runs under checkpoints/, one record for every folder. Records are made from metadata only: no
tensor is read or hashed, and torch is not imported. The record of a damaged folder, or of one that
is not a run, says what is wrong with it.
"""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir
from nanochat.base.files import release, reserve, reserved
from nanochat.base.strangers import is_number, mismatch, read_json
from nanochat.model.header import read_header
from nanochat.model.stages import STAGES, by_preference, lock_file, step_folders, was_set_aside

MOST_META = 2**22  # bytes
_META = {"tokens": int, "seconds": float, "done": bool, "last": {str: {str: object}}}
_OF_A_RUN = re.compile(r"metrics\.jsonl|tensorboard|wandb|trackio|\.?(damaged_)?step_\d+\S*")
_OF_A_CHECKPOINT = re.compile(r"(model|optim)\.safetensors|(meta|manifest)\.json|\..+\.tmp")


@dataclass
class RunRecord:
    """A run, or another folder beside runs. What is not known is None."""

    stage: str
    tag: str
    folder: str
    disk_bytes: int
    state: str = "finished"  # or "training", "unfinished", "set aside"
    problem: str = ""  # why it has no model that could be used
    default: bool = False  # whether commands use this model unless told otherwise
    step: int | None = None  # of the newest checkpoint
    saved: str | None = None  # when that was, as 2026-01-31T12:00:00
    parameters: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    val_bpb: float | None = None
    accuracy: float | None = None  # in the newest chat_eval
    questions: int | None = None
    pass_at_1: float | None = None

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.tag}" if self.tag else self.stage


def find_records() -> list[RunRecord]:
    """All runs in the order in which commands prefer them, and then what is not a run."""
    in_stages = list(by_preference())
    records = [_record(stage, run) for stage, run in in_stages if run.is_dir()]
    usable = [record for record in records if not record.problem]
    if usable:
        usable[0].default = True
    for path in sorted((base_dir() / "checkpoints").glob("*")):
        if path.name not in STAGES:
            problem = "there is no such stage"
            records.append(RunRecord(path.name, "", str(path), size_of(path), problem=problem))
    for stage, path in sorted(in_stages):
        if not path.is_dir() and not re.fullmatch(r"\..+\.lock", path.name):
            problem = "it is not a folder"
            records.append(RunRecord(stage, path.name, str(path), size_of(path), problem=problem))
    return records


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder (or of one file); links are not followed."""
    size = 0
    inside = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    for path in inside if folder.is_dir() else [folder]:
        with suppress(FileNotFoundError):  # a run that saves has renamed or deleted it
            size += os.lstat(path).st_size
    return size


def _record(stage: str, run: Path) -> RunRecord:
    record = RunRecord(stage, run.name, str(run), size_of(run))
    if reserved(lock_file(run)):
        record.state = "training"
    elif was_set_aside(run):
        record.state = "set aside"
    pilot = ", only the log of a pilot" if run.name.startswith("pilot-") else ""
    record.problem = f"it holds no checkpoint{pilot}"
    for folder in reversed(step_folders(run)):
        try:
            _fill(record, folder)
            record.problem = ""
            break
        except (OSError, ValueError, KeyError, TypeError, UserError) as e:
            record.problem = f"{folder.name} is damaged ({e})"
    answers = logbook.newest(run, "chat_eval")
    if is_number(answers.get("accuracy")) and is_number(answers.get("n")):
        record.accuracy, record.questions = answers["accuracy"], int(answers["n"])
    return record


def _fill(record: RunRecord, folder: Path) -> None:
    """
    Add what a checkpoint says to its record. OSError, ValueError, KeyError or TypeError if the
    checkpoint is damaged.
    """
    read_json(folder / "manifest.json")["model.safetensors"]  # KeyError if it is incomplete
    meta: dict[str, Any] = read_json(folder / "meta.json", MOST_META)
    if fault := mismatch(meta, _META, "meta"):
        raise ValueError(fault)
    header = read_header(folder / "model.safetensors")
    trained = [s for name, (_, s) in header.items() if not re.match(r"prior\.(?!gates)", name)]
    record.parameters = sum(map(prod, trained))
    record.step = int(folder.name[5:])
    record.saved = datetime.fromtimestamp(folder.stat().st_mtime).isoformat(timespec="seconds")
    record.tokens, record.seconds = meta.get("tokens"), meta.get("seconds")
    figures = meta.get("last", {}).get("eval", {})
    figures = {name: value for name, value in figures.items() if is_number(value)}
    record.val_bpb, record.pass_at_1 = figures.get("val_bpb"), figures.get("pass@1")
    if record.state == "finished" and not meta.get("done", True):
        record.state = "unfinished"


def check_removable(record: RunRecord) -> None:
    """UserError if this is not a run, or if its folder has a file that no run writes."""
    run = Path(record.folder)
    if record.stage not in STAGES or not run.is_dir() or run.is_symlink():
        raise UserError(f"{run} is a link or not the folder of a run: remove it yourself")
    files = sorted(run.iterdir())
    foreign = [p for p in files if not _OF_A_RUN.fullmatch(p.name) or p.is_symlink()]
    foreign += [p for p in run.glob("*step_*/*") if not _OF_A_CHECKPOINT.fullmatch(p.name)]
    if foreign:
        raise UserError(
            f"{run} holds {foreign[0].relative_to(run)}, which no run writes: move it elsewhere, "
            "or remove the folder yourself"
        )


def remove(record: RunRecord) -> None:
    """
    Delete a run's folder, with its lock held. UserError if a process trains in it, if it cannot be
    deleted, or as check_removable. After an interruption, it can be called again.
    """
    run = Path(record.folder)
    reserve(lock_file(run), f"the run {record.name}")
    try:
        check_removable(record)
        shutil.rmtree(run)
    except OSError as e:
        raise UserError(
            f"cannot remove {e.filename or run} ({e.strerror}): change its mode or its owner, and "
            "repeat the command"
        ) from e
    finally:
        release()
