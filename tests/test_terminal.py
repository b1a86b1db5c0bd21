"""
What strangers and models write, on a terminal: it must neither change the terminal's state nor pose
as a message of ours. Every surface shows the same text; here both streams count as a terminal.
"""

import json
import re
import zipfile
from pathlib import Path

import hostile_logbooks
import pytest
from test_core import bundle

from nanochat.base import common, knobs, logbook, progress
from nanochat.base.common import UserError, columns, entry, notice, print0
from nanochat.base.progress import StatusLine
from nanochat.base.strangers import shown
from nanochat.chat.terminal import Screen
from nanochat.commands import base_eval, models, summary
from nanochat.commands.base_train import PretrainKnobs
from nanochat.data import hub, inventory
from nanochat.data.rendering import visible_content
from nanochat.data.sources import parse_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import core_bundle
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import load_for_inference
from nanochat.plan import machine
from nanochat.train.chain import Display

EVIL = (
    "x\x1b[2J\x1b]0;owned\x07\x1bP1q\x1b\\\x9b31m\x9d0;owned\x9c\u202eevil\u2066\x08\x7f\x0e"
    "\r\x1b[A\nerror: forged\x85error: forged\u2028error: forged\verror: forged"
)
NAME = EVIL.encode("utf-8").replace(b"/", b"").decode()
OURS = re.compile(r"\x1b\[(\d+(;\d+)*)?[mKA]|\x1b\[\?25[lh]|\r(?=\x1b\[|\n)")
MOVES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\r]")


def raises(error: Exception):
    def main() -> None:
        raise error

    return main


def ended(main) -> None:
    with pytest.raises(SystemExit):
        entry(main)


def text_folder(base: Path) -> Path:
    folder = base / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a story about {i}. " * 20)
    return folder


def survey(base: Path, name: str, data: bytes) -> None:
    """What tok_train --dry_run prints about a folder with this file."""
    folder = text_folder(base)
    (folder / name).write_bytes(data)
    for line in inventory.as_lines(inventory.take(parse_sources([str(folder)]))):
        print0(line)


def refusal(base: Path, name: str, data: str) -> None:
    """The error about a file of conversations."""
    (base / name).write_text(data)
    ended(lambda: mixture.shards([str(base / name)], "train", Tokenizer.load()))


def lines_of(text: str, n: int = 4) -> bytes:
    return "".join(
        json.dumps({"text": f"{text} {i}\n{text}\nend"}) + "\n" for i in range(n)
    ).encode()


def runs(base: Path) -> None:
    for stage in ("base", "sft"):
        folder = base / "checkpoints" / stage
        (folder / "old").rename(folder / NAME)
    models.main([])


def samples(base: Path) -> None:
    run = base / "checkpoints/base/old"
    hostile_logbooks.spoil(hostile_logbooks.score(), run / "metrics.jsonl")
    rows = logbook.by_kind(run)
    kinds = {EVIL: rows["chat_eval"]["kinds"].popitem()[1]}
    figures = {"tokens": 1, "minutes": 1.0, "val_bpb": 1.0, "n": 1, "lo": 0.1, "hi": 0.2}
    print0(summary.table({EVIL: {**figures, "accuracy": 0.1, "chance": 0.1, "kinds": kinds}}))


def labels(base: Path) -> None:
    result = {"kind": EVIL, "n": 1, "accuracy": 0, "lo": 0, "hi": 0, "chance": 0, "centred": 0}
    result |= {"had": 0, "shots": 0, "fewer": 0, "cropped": 0, "overlong": 0}
    print0(base_eval.core_table({"tasks": {EVIL: result}, "absent": [EVIL]}))


def bundle_error(base: Path) -> None:
    folder = bundle(base / "bundle")
    data = folder / "eval_data/some/schema.jsonl"
    data.write_text(json.dumps({**json.loads(data.read_text().splitlines()[0]), "gold": EVIL}))
    ended(lambda: core_bundle.load_bundle(folder))


def hub_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_):
        raise hub.HTTPException(EVIL)

    monkeypatch.setattr(hub, "_get", get)
    ended(lambda: hub.pin("some/data", base))


def archive(base: Path) -> None:
    with zipfile.ZipFile(base / "z.zip", "w") as z:
        z.writestr(NAME + ".txt", b"\0\0\0")
    survey(base, NAME.replace("\n", "") + ".zip", (base / "z.zip").read_bytes())


def checkpoint(base: Path) -> None:
    step = base / "checkpoints/sft/old/step_000003"
    meta = json.loads((step / "meta.json").read_text())
    (step / "meta.json").write_text(json.dumps({**meta, "dtype": EVIL, EVIL: EVIL}))
    ended(lambda: load_for_inference("sft"))


def conversation(base: Path) -> None:
    """A saved chat, read into a chat on a terminal."""
    turns = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    (base / "talk.json").write_text(json.dumps({"messages": turns}))
    screen = Screen(True)
    for turn in json.loads((base / "talk.json").read_text())["messages"]:
        screen.label(turn["role"] + EVIL)
        screen.write(visible_content(turn["content"]))
        screen.end()
        screen.remark(turn["content"])


def probe(base: Path) -> None:
    (base / "probe.json").write_text(json.dumps({"machine": {"name": EVIL}, "points": []}))
    ended(lambda: machine.load(base / "probe.json"))


def chain(base: Path) -> None:
    display = Display(base / "log")
    display.write(EVIL, replaced=True)
    display.write(EVIL)


def bar(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1)
    with progress.progress(3, EVIL, EVIL) as shown_bar:
        shown_bar.update(1, note=EVIL)


def another_rank(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.time, "sleep", lambda _: None)
    monkeypatch.setenv("RANK", "1")
    ended(raises(UserError(EVIL)))


def recipe(base: Path) -> None:
    (base / "r.toml").write_text(
        f"[base_train]\nmodel_tag = {json.dumps(EVIL)}\ncompile = {json.dumps(EVIL)}\n"
    )
    ended(
        lambda: knobs.parse(PretrainKnobs, ["--recipe", str(base / "r.toml")], command="base_train")
    )


def settings(base: Path) -> None:
    values = PretrainKnobs(model_tag=EVIL)
    print0(knobs.show(values, {"model_tag": EVIL}))


def parquet(base: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({EVIL: ["a", "b"]}), base / "a.parquet")
    inventory.show(parse_sources([str(base / "a.parquet")]))


def status(base: Path) -> None:
    line = StatusLine(0)
    line.show(EVIL)
    line.print(EVIL)


SURFACES = {
    "an error": lambda base: ended(raises(UserError(EVIL))),
    "an error of the system": lambda base: ended(raises(PermissionError(13, EVIL, EVIL))),
    "an error of another rank": another_rank,
    "a notice": lambda base: notice(EVIL),
    "a line": lambda base: print0(EVIL.replace("\nerror", "")),
    "a table": lambda base: print0(columns([EVIL, "b"], [[EVIL, EVIL]])),
    "a value in a message": lambda base: print0(shown(EVIL), shown([EVIL]), shown({EVIL: 1})),
    "a status line": status,
    "a progress bar": bar,
    "a chain's line": chain,
    "tags of runs": runs,
    "kinds of questions": samples,
    "labels of tasks": labels,
    "a row of a bundle": bundle_error,
    "metadata of a checkpoint": checkpoint,
    "names of files": lambda base: survey(base, NAME + ".txt", b"\0\1\2"),
    "names of hidden files": lambda base: survey(base, "." + NAME + ".txt", b"hidden"),
    "names in an archive": archive,
    "first words of documents": lambda base: survey(base, "a.jsonl", lines_of(EVIL)),
    "lines of many documents": lambda base: survey(base, "a.jsonl", lines_of(EVIL * 2, 40)),
    "fields of rows": lambda base: survey(base, "a.jsonl", json.dumps({EVIL: 1}).encode()),
    "columns of tables": parquet,
    "roles of turns": lambda base: refusal(base, "a.jsonl", json.dumps({"messages": [{"role": EVIL, "content": "x"}]})),
    "kinds of parts": lambda base: refusal(base, "b.jsonl", json.dumps({"messages": [{"role": "user", "content": [{"type": EVIL}]}]})),
    "people of a chat": lambda base: refusal(base, "c.json", json.dumps({"messages": [{"author": {"name": EVIL}, "timestamp": "2026-01-01", "content": EVIL}] * 4})),
    "a saved conversation": conversation,
    "what a hub answers": hub_error,
    "a recipe": recipe,
    "settings": settings,
    "a probe": probe,
}  # fmt: skip


@pytest.mark.parametrize("name", SURFACES)
def test_no_text_of_a_stranger_moves_a_terminal(release, name, monkeypatch, capsys):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    act = SURFACES[name]
    act(release, monkeypatch) if act.__code__.co_argcount == 2 else act(release)
    captured = capsys.readouterr()
    printed = OURS.sub("", captured.out + captured.err)
    assert printed.strip(), "the surface shows nothing: what it shows has moved elsewhere"
    assert not (moves := MOVES.search(printed)), repr(printed[: moves.end()][-200:])
    if name not in (
        "a line",
        "a saved conversation",
        "a status line",
        "a chain's line",
        "settings",
    ):
        forged = [line for line in printed.splitlines() if line.startswith("error: forged")]
        assert not forged, printed
