"""
Files of a public data set on the Hugging Face hub, at one pinned commit. huggingface_hub lists and
transfers them; this module adds what the library does not do: manifest.json in the target folder
pins the commit, so that later calls never mix two versions; a partial file is kept (NAME.HASH.part)
and continued by the next run; a file is renamed to its final name only after its size and SHA-256
have been checked, so whatever has its final name is complete.
"""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from nanochat.base.common import UserError, human
from nanochat.base.files import atomic_write, sha256_file
from nanochat.base.progress import progress

ATTEMPTS = 5  # per file; within each, the library continues broken connections itself
BACKOFF = 1.0  # seconds before the second attempt; doubles with each further one


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it; sha256 is None for small files, which the hub does not hash."""

    path: str
    size: int
    sha256: str | None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def pin(repo: str, folder: Path, revision: str | None = None) -> tuple[str, dict[str, Listed]]:
    """
    The commit that `folder` is pinned to and its files by path. The first call resolves `revision`
    (None means "main") and writes manifest.json; later calls read that file and need no network,
    unless they name a different revision. Raises UserError if the hub cannot be reached or lacks
    the data set.
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
                f"{path} is damaged ({e}): delete it and run again; the files are then checked "
                "against the newest commit"
            ) from e
    revision = revision or "main"
    commit, files = _list(repo, revision)
    listed = [vars(f) for f in files.values()]
    manifest = {"repo": repo, "revision": revision, "commit": commit, "files": listed}
    atomic_write(path, json.dumps(manifest, indent=1))
    return commit, files


def _list(repo: str, revision: str) -> tuple[str, dict[str, Listed]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=_endpoint())
    try:
        commit = api.dataset_info(repo, revision=revision).sha or revision
        tree = api.list_repo_tree(repo, revision=commit, repo_type="dataset", recursive=True)
        files = [f for f in tree if isinstance(f, RepoFile)]
    except Exception as e:  # which exceptions the library raises depends on its HTTP client
        raise UserError(
            f"cannot list {repo} at revision {revision} on {_endpoint()} ({_reason(e)}): check the "
            "name, the revision and the network, or set HF_ENDPOINT to a mirror; training on your "
            "own text needs no network"
        ) from e
    return commit, {f.path: Listed(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in files}


def download(
    repo: str, commit: str, files: Sequence[Listed], folder: Path, workers: int = 4
) -> None:
    """
    Bring `files` into `folder`, complete and verified. Files that are already there are verified
    and fetched again only if damaged. Raises UserError if a file cannot be fetched; whatever has
    arrived by then, partial files included, stays, and the next call continues from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(f.size - _arrived(f, folder) for f in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the download needs {human(needed)}B, but {folder} has only {human(free)}B free: free "
            "some space or ask for fewer files"
        )
    stop, pool = threading.Event(), ThreadPoolExecutor(workers)
    total = sum(f.size for f in files)
    try:
        running = {pool.submit(_fetch, repo, commit, f, folder, stop) for f in files}
        with progress(total, f"downloading {len(files)} files", "bytes") as bar:
            while running:
                done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for job in done:
                    job.result()
                bar.update(sum(_arrived(f, folder) for f in files))
    finally:  # after Ctrl+C or an error the other workers stop at their next chunk
        stop.set()
        pool.shutdown(cancel_futures=True)


class _PartialFile(FileIO):
    """A file opened for appending; writing raises InterruptedError once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event):
        super().__init__(path, "ab")
        self._stop = stop

    def write(self, data) -> int:
        if self._stop.is_set():
            raise InterruptedError
        try:
            return super().write(data)
        except OSError as e:
            raise UserError(
                f"cannot write {self.name} ({e.strerror}): free some space and run again; the "
                "download continues where it stopped"
            ) from e


def _fetch(repo: str, commit: str, file: Listed, folder: Path, stop: threading.Event) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target, part = folder / file.path, _part(file, folder)
    if not _problem(target, file):
        return
    target.unlink(missing_ok=True)  # damaged, or from another commit
    target.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=commit, endpoint=_endpoint())
    problem, refused = "", False
    for attempt in range(ATTEMPTS):
        try:
            with _PartialFile(part, stop) as f:
                size, headers = f.tell(), build_hf_headers()
                http_get(url, f, resume_size=size, expected_size=file.size, headers=headers)
        except (InterruptedError, UserError):
            raise
        except Exception as e:  # which exceptions the library raises depends on its HTTP client
            problem, refused = _reason(e), _is_refusal(e)
        if _size(part) >= file.size:
            problem = _problem(part, file)
            if not problem:
                os.replace(part, target)
                return
        if not 0 < _size(part) < file.size:
            part.unlink()
        if refused:
            break
        stop.wait(BACKOFF * 2**attempt)
    raise UserError(
        f"cannot fetch {url} ({problem}): check the network and the revision, then run again; "
        "the download continues where it stopped"
    )


def _is_refusal(error: Exception) -> bool:
    """Whether the hub replied with a status that trying again does not change."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return status < 500 and status not in (408, 429)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _problem(path: Path, file: Listed) -> str:
    """What is wrong with the file at `path`; empty if it is as listed."""
    if not path.exists() or _size(path) != file.size:
        return f"{_size(path):,} bytes instead of {file.size:,}"
    if file.sha256 and sha256_file(path) != file.sha256:
        return "its SHA-256 is not the one listed"
    return ""


def _part(file: Listed, folder: Path) -> Path:
    """Where a partial download is kept; its hash stops another version from continuing it."""
    return folder / f"{file.path}.{(file.sha256 or str(file.size))[:12]}.part"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _arrived(file: Listed, folder: Path) -> int:
    """Bytes of a file that are on the disk, complete or partial."""
    return min(file.size, _size(folder / file.path) or _size(_part(file, folder)))
