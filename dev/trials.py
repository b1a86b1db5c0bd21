"""
What the experiments on real text share: their corpora, and comparisons that resume where they
stopped, also on another machine, because the records of all runs are in dev/results/.
rap_experiments.py and budget_experiments.py say what is compared; scripts.compare does the work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "dev" / "results"
RECORDS = "conditions.json", "runs.jsonl", "results.json"  # of a comparison


def command_line(
    about: str, folder: str, names: Sequence[str], needs_texts: bool = True
) -> argparse.ArgumentParser:
    """The options that experiments share; with `names`, also those of comparisons."""
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0], allow_abbrev=False)
    cache = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    parser.add_argument(
        "--texts",
        type=Path,
        required=needs_texts,
        help="folder with wikipedia/, books/, reddit/ and dialog/",
    )
    parser.add_argument(
        "--base", type=Path, default=cache / folder, help="folder for everything that is written"
    )
    if not names:
        return parser
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=list(names),
        metavar="NAME",
        help=", ".join(names),
    )
    parser.add_argument(
        "--retime",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="then time the conditions again; run nothing else meanwhile",
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        metavar="NAME",
        help="run only these conditions; the others can follow",
    )
    return parser


def run(words: Sequence[str], base: Path) -> None:
    """
    Run a command of this repository with `base` as its base folder; exit with its status if it
    fails.
    """
    path = os.pathsep.join(p for p in (str(REPO), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=base,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path},
    )
    if done.returncode:
        sys.exit(done.returncode)


def stored(file: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a file of results that have these values."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if wanted.items() <= row.items()]


def add(file: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Append a row to a file of results, and return it."""
    RESULTS.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    return row


def prepared(corpus: str, texts: Path | None, base: Path, vocab_size: int) -> list[str]:
    """
    The words of --data for a corpus, with paths from the base folder on, so that no path of a
    machine gets into results; makes the tokenizer and the token shards. A corpus is prose, code,
    tables (invented), dialogues (all of them), slots (those that serve a task) or tinyworld.
    """
    base.mkdir(parents=True, exist_ok=True)
    if corpus == "tinyworld" or texts is None:
        data = [corpus]
    elif corpus == "prose":
        link = base / "texts"
        if not link.exists():
            link.unlink(missing_ok=True)  # the folder that it leads to was moved
            link.symlink_to(texts.resolve(), target_is_directory=True)
        elif link.resolve() != texts.resolve():
            sys.exit(
                f"error: {link} leads to {link.resolve()}, not to {texts}: name that folder with "
                "--texts, or another --base"
            )
        data = [
            f"{name}=texts/{name}:{weight}"
            for name, weight in (("wikipedia", 0.45), ("books", 0.40), ("reddit", 0.15))
        ]
    else:
        file = base / f"{corpus}.jsonl"
        maker = {"code": "python_library.py", "tables": "made_tables.py"}.get(corpus)
        if maker and not file.exists():
            run([str(REPO / "dev" / maker), str(file)], base)
        elif not file.exists():
            of_tasks = "sgd_train.jsonl", "sgd_val.jsonl", "taskmaster4.jsonl"
            rows = [
                json.loads(line)
                for p in sorted((texts / "dialog").glob("*.jsonl"))
                if corpus == "dialogues" or p.name in of_tasks
                for line in p.open(encoding="utf-8")
            ]
            documents = [
                "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
                for row in rows
                if "messages" in row
            ]
            file.write_text(
                "".join(json.dumps({"text": d}) + "\n" for d in documents if d.strip()),
                encoding="utf-8",
            )
        data = [f"{corpus}={file.name}"]
    if not (base / "tokenizer" / "tokenizer.json").exists():
        words = [f"--vocab_size={vocab_size}", "--digits=2", "--data", *data]
        run(["-m", "scripts.tok_train", *words], base)
    run(["-m", "scripts.tok_data", "--data", *data], base)
    return data


def compare(
    name: str,
    base: Path,
    common: str,
    seeds: int,
    conditions: Mapping[str, str],
    related: Sequence[str],
    retime: int,
) -> None:
    """
    Run scripts.compare. `conditions` maps names to flags, the baseline first; `common` are the
    flags of all, with --data. It starts from the runs in dev/results/ of `name`, and of the same
    conditions in `related` experiments, which have the same base and common flags. Its records are
    copied there, however it ends.
    """
    folder = base / "compare" / name
    if not folder.exists():
        _adopt([name, *related], conditions, folder)
    words = [
        "-m",
        "scripts.compare",
        f"--name={name}",
        f"--seeds={seeds}",
        f"--common={common}",
        f"--retime={retime}",
    ]
    words += [
        f"--{letter}={flags}"
        for letter, flags in zip("abcdefgh", conditions.values(), strict=False)
    ]
    try:
        run([*words, "--names", *conditions], base)
    finally:
        RESULTS.mkdir(exist_ok=True)
        for kind in RECORDS if (folder / "results.json").exists() else ():
            shutil.copyfile(folder / kind, RESULTS / f"{name}.{kind}")


def _adopt(names: Sequence[str], conditions: Mapping[str, str], folder: Path) -> None:
    """
    Runs that were made elsewhere: all of the first name, of the others those of the conditions.
    """
    plan: dict[str, list[str]] = {}
    runs: list[str] = []
    for i, name in enumerate(names):
        if not (RESULTS / f"{name}.runs.jsonl").exists():
            continue
        theirs = json.loads((RESULTS / f"{name}.conditions.json").read_text(encoding="utf-8"))
        new = {
            c: flags for c, flags in theirs.items() if c not in plan and (i == 0 or c in conditions)
        }
        lines = (RESULTS / f"{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        runs += [line for line in lines if json.loads(line)["condition"] in new]
        plan |= new
    if runs:
        folder.mkdir(parents=True)
        (folder / "conditions.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
        (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in runs), encoding="utf-8")
