"""
Files of a public data set on the hub: listed at one pinned commit, fetched by several workers, resumed in the middle of a file, verified.
Plain HTTP of the standard library, not huggingface_hub: that keeps its own cache beside our folder and checks sizes, not hashes.

A file is written as NAME.HASH.part, checked against the size and SHA-256 that the hub lists, and only then renamed: what has its name
is whole. It refuses to mix commits: the first call pins the branch's commit in manifest.json, and later calls keep to it unless they
name another revision.
"""

import errno
import http.client
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, human, print0
from nanochat.base.files import atomic_write, sha256_file

CHUNK = 1 << 18
ATTEMPTS = 6  # in a row without a byte gained
TIMEOUT = 30  # seconds without a byte
BACKOFF = 1.0  # seconds before the second attempt, doubled before each one after


class _Corrupt(Exception):
    """What arrived is not what the hub lists."""


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it; sha256 is None for the small ones that it keeps without a hash."""

    path: str
    size: int
    sha256: str | None


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, as huggingface_hub has it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def pin(repo: str, folder: Path, revision: str | None = None) -> tuple[str, dict[str, Listed]]:
    """
    The commit that `folder` is pinned to, and its files. The first call resolves `revision` (None: "main") and writes manifest.json;
    later ones read that, without the network, unless they name another revision.
    """
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_text())
            files = {f["path"]: Listed(**f) for f in manifest["files"]}
            if revision in (None, manifest["commit"], manifest["revision"]):
                return manifest["commit"], files
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} is damaged ({e}): delete it, and the files are verified against the newest commit"
            ) from e
    revision = revision or "main"
    quoted = urllib.parse.quote(revision, safe="")
    about, _ = _get_json(
        f"{endpoint()}/api/datasets/{repo}/revision/{quoted}", f"{repo} at revision {revision}"
    )
    commit = about["sha"]
    files, url = {}, f"{endpoint()}/api/datasets/{repo}/tree/{commit}?recursive=true"
    while url:
        page, url = _get_json(url, f"the files of {repo}")
        for entry in page:
            if entry["type"] == "file":
                lfs = entry.get("lfs") or {}
                sha256 = lfs["oid"].removeprefix("sha256:") if lfs else None
                files[entry["path"]] = Listed(entry["path"], lfs.get("size", entry["size"]), sha256)
    manifest = {
        "repo": repo,
        "revision": revision,
        "commit": commit,
        "files": [vars(f) for f in files.values()],
    }
    atomic_write(path, json.dumps(manifest, indent=1))
    return commit, files


def download(
    repo: str, commit: str, files: Sequence[Listed], folder: Path, workers: int = 4
) -> None:
    """
    Have `files` in `folder`, whole and verified; those there already are verified, not fetched. Raises UserError when one cannot be
    had; the others and all that arrived of it stay, and the next call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        f
        for f in files
        if not (folder / f.path).exists() or (folder / f.path).stat().st_size != f.size
    ]
    need, free = (
        sum(f.size - _arrived(_part(folder, f)) for f in todo),
        shutil.disk_usage(folder).free,
    )
    if need > free:
        raise UserError(
            f"{len(todo)} files need {human(need)}B and {folder} has {human(free)}B: free some space or ask for fewer"
        )
    stop = threading.Event()
    pool = ThreadPoolExecutor(max(1, workers))
    with _progress(len(files), sum(f.size for f in files)) as (advance, done):
        jobs = {pool.submit(_have, repo, commit, f, folder, advance, stop): f for f in files}
        try:
            running = set(jobs)
            while running:
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for job in finished:
                    job.result()
                    done(jobs[job])
        finally:  # Ctrl+C, or a file that cannot be had: the others stop at their next chunk, and keep what they have
            stop.set()
            pool.shutdown(cancel_futures=True)


def _have(
    repo: str,
    commit: str,
    file: Listed,
    folder: Path,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    target, part = folder / file.path, _part(folder, file)
    if target.exists():
        if not _wrong(target, file):
            advance(file.size)
            return
        target.unlink()  # damaged since, or of another commit
    target.parent.mkdir(parents=True, exist_ok=True)
    failures, counted = 0, 0
    url = f"{endpoint()}/datasets/{repo}/resolve/{commit}/{urllib.parse.quote(file.path)}"
    while not stop.is_set():
        before = _arrived(part)
        advance(before - counted)
        counted = before
        try:
            for n in _receive(url, part, file.size, stop):
                advance(n - counted)
                counted = n
            if stop.is_set():
                return
            if wrong := _wrong(part, file):
                if (
                    _arrived(part) >= file.size
                ):  # a connection that broke off early is gone on with instead
                    part.unlink()
                raise _Corrupt(wrong)
            os.replace(part, target)
            return
        except urllib.error.HTTPError as e:
            if e.code not in (408, 416, 429) and e.code < 500:
                raise UserError(
                    f"the hub refuses {url} ({e.code} {e.reason}): check the data set and the revision"
                ) from e
            if e.code == 416:
                part.unlink(missing_ok=True)
            reason = f"{e.code} {e.reason}"
        except (OSError, http.client.HTTPException, _Corrupt) as e:
            if isinstance(e, OSError) and e.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EACCES,
                errno.EROFS,
            ):
                raise UserError(
                    f"cannot write {part} ({e.strerror}): free some space; what has arrived is kept"
                ) from e
            reason = str(getattr(e, "reason", e)) or type(e).__name__
        failures = 1 if _arrived(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise UserError(
                f"cannot fetch {url} ({reason}): check the network, then run again; what has arrived is kept"
            )
        stop.wait(BACKOFF * 2 ** (failures - 1))


def _receive(url: str, part: Path, size: int, stop: threading.Event) -> Iterator[int]:
    """Fetch what `part` lacks, and yield its growing size."""
    have = _arrived(part)
    if have >= size:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT
    ) as response:
        if have and not re.match(rf"bytes {have}-", response.headers.get("Content-Range", "")):
            have = 0  # a server that knows no ranges sends everything
        with open(part, "ab") as f:
            f.truncate(have)
            while not stop.is_set() and (chunk := response.read(CHUNK)):
                f.write(chunk)
                have += len(chunk)
                yield have


def _wrong(path: Path, file: Listed) -> str:
    """What is wrong with a file; empty if it is as listed."""
    size = path.stat().st_size if path.exists() else 0
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    return "another SHA-256 than listed" if file.sha256 and sha256_file(path) != file.sha256 else ""


def _part(folder: Path, file: Listed) -> Path:
    return (
        folder / f"{file.path}.{(file.sha256 or str(file.size))[:12]}.part"
    )  # so that another version is never continued


def _arrived(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _get_json(url: str, what: str) -> tuple[Any, str | None]:
    """A reply of the API, and the address of its next page."""
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
                return json.load(response), following and urllib.parse.urljoin(url, following[1])
        except urllib.error.HTTPError as e:
            if e.code != 429 and e.code < 500:
                raise UserError(
                    f"the hub has no {what} ({e.code} {e.reason}): check its name and the revision"
                ) from e
            reason = f"{e.code} {e.reason}"
        except urllib.error.URLError as e:
            reason = str(e.reason)
            if isinstance(e.reason, OSError) and not isinstance(e.reason, TimeoutError):
                break  # no such host, refused: no use in trying again at once
        except (OSError, http.client.HTTPException, ValueError) as e:
            reason = str(e) or type(e).__name__
        if attempt + 1 < ATTEMPTS:
            time.sleep(BACKOFF * 2**attempt)
    raise UserError(
        f"cannot reach {endpoint()} ({reason}): check the network, or name a mirror with HF_ENDPOINT; own text needs none"
    )


@contextmanager
def _progress(
    count: int, total: int
) -> Iterator[tuple[Callable[[int], None], Callable[[Listed], None]]]:
    """A bar on a terminal, else a line a file."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console, finished = Console(stderr=True), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"0/{count} files", total=total)

        def done(file: Listed) -> None:
            nonlocal finished
            finished += 1
            bar.update(task, description=f"{finished}/{count} files")
            if not console.is_terminal:
                print0(f"{file.path} ({human(file.size)}B) is here, {finished}/{count}")

        yield lambda n: bar.advance(task, n), done
