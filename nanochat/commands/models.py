"""
List what is trained, or remove runs that are no longer needed.

    nanochat models                       one line per run; the default model is marked
    nanochat models --remove sft/d4       deletes this run after asking
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanochat.base.commands import near
from nanochat.base.common import UserError, base_dir, columns, entry, human, print0
from nanochat.base.knobs import knob, parse
from nanochat.model.runs import RunRecord, check_removable, find_records, remove


@dataclass(kw_only=True)
class ModelsKnobs:
    """Models"""

    json: bool = knob(False, "print only JSON")
    remove: tuple[str, ...] = knob(
        (), "runs to delete with their checkpoints and logbooks, each as STAGE/TAG"
    )
    yes: bool = knob(False, "delete without asking", alias="-y")


def table(records: Sequence[RunRecord]) -> str:
    """A table for a terminal, with one line per run."""
    rows = []
    for r in records:
        accuracy = "" if r.accuracy is None else f"{r.accuracy:.1%} of {r.questions}"
        if r.accuracy is None and r.pass_at_1 is not None:
            accuracy = f"{r.pass_at_1:.1%} (pass@1)"
        notes = ("default" if r.default else "", "" if r.state == "finished" else r.state)
        rows.append(
            [
                " ".join(r.name.split()),
                "" if r.parameters is None else human(r.parameters),
                "" if r.tokens is None else human(r.tokens),
                "" if r.val_bpb is None else f"{r.val_bpb:.4f}",
                accuracy,
                "" if r.saved is None else r.saved[:16].replace("T", " "),
                f"{human(r.disk_bytes)}B",
                ", ".join(note for note in (*notes, r.problem) if note),
            ]
        )
    head = "run, parameters, tokens, val bpb, accuracy, saved, disk, note"
    return columns(head.split(", "), rows)


def chosen(names: Sequence[str], records: Sequence[RunRecord]) -> list[RunRecord]:
    """
    The records with these names, each once. UserError for a name that no record has, or one of a
    folder that cannot be removed safely.
    """
    by_name = {record.name: record for record in records}
    for name in names:
        if name not in by_name:
            raise UserError(
                f"there is no run {name!r}{near(name, by_name)}: nanochat models lists all of them "
                "as STAGE/TAG"
            )
        check_removable(by_name[name])
    return [by_name[name] for name in dict.fromkeys(names)]


def confirmed(records: Sequence[RunRecord]) -> bool:
    """Ask at the terminal whether to delete these runs. UserError if there is no terminal."""
    print0(table(records))
    if not sys.stdin.isatty():
        raise UserError(
            "there is no terminal to ask whether to delete these runs: add --yes to delete them"
        )
    size = human(sum(record.disk_bytes for record in records))
    try:
        return input(f"delete these for good, {size}B? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def main(argv: Sequence[str] | None = None) -> list[RunRecord]:
    knobs, _ = parse(ModelsKnobs, argv, command="models")
    records = find_records()
    if knobs.remove:
        records = chosen(knobs.remove, records)
        if not knobs.yes and not confirmed(records):
            print0("nothing was deleted")
            return []
        for record in records:
            remove(record)
            free = human(shutil.disk_usage(base_dir()).free)
            print0(f"deleted {record.name}: freed {human(record.disk_bytes)}B, {free}B are free")
    elif knobs.json:
        print0(json.dumps([asdict(record) for record in records], indent=1))
    elif not records:
        print0("nothing is trained yet: nanochat quickstart trains a small model")
    else:
        print0(table(records))
        print0(f"in {base_dir() / 'checkpoints'}; val bpb: on text in base, else on conversations")
    return records


if __name__ == "__main__":
    entry(main)
