"""
Files of a public data set on the Hugging Face hub, at one pinned commit, over plain HTTPS.
manifest.json in the target folder pins the commit, so that later calls never mix two versions; a
partial file is kept (NAME.HASH.part) and continued by the next run; a file is renamed to its final
name only after its size and SHA-256 have been checked, so whatever has its final name is complete.

The server is not trusted: no listed name may lead out of the folder, no reply may be longer than
listed or take longer than its size allows, and redirects and further pages must stay on the hub's
own hosts.
"""

import hashlib
import os
import re
import shutil
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from nanochat.base.common import UserError, disk_error, human
from nanochat.base.files import sha256_file, write_json
from nanochat.base.progress import progress
from nanochat.base.strangers import mismatch, missing, parse_json, read_json, shown

ATTEMPTS = 10  # per file; each continues the one before
BACKOFF = 1.0  # seconds before the second attempt; doubles with each further one, up to 30
STALL = 30.0  # seconds without a byte, after which an attempt ends
SLOWEST = 20_000  # bytes per second; an attempt that is slower ends
CHUNK = 2**20
MOST_PAGE = 2**24  # bytes of one reply of the API
MOST_PAGES = 1000  # of a list of files
MOST_FILES = 200_000
OWN = "manifest.json", ".lock"  # names of nanochat's own files in a folder of downloads
HOSTS = ".huggingface.co", ".hf.co"  # endings of trusted host names, besides the endpoint's own
FILE = {"path": str, "size": int, "sha256": (str, None), "blob": (str, None)}


@dataclass(frozen=True)
class Listed:
    """
    A file as the hub lists it. Large files have a SHA-256; small ones have the id of their blob in
    git, SHA-1 of "blob SIZE\\0" and their bytes.
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None = None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def pin(repo: str, folder: Path, revision: str | None = None) -> tuple[str, dict[str, Listed]]:
    """
    The commit that `folder` is pinned to and its files by path. The first call resolves `revision`
    (None means "main") and writes manifest.json; later calls read that file and need no network,
    unless they name a different revision. Raises UserError if the hub cannot be reached, lacks the
    data set, or lists unsafe names.
    """
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = read_json(path)
            if revision in (None, manifest["commit"], manifest["revision"]):
                return _commit(manifest["commit"], None), _listed(manifest["files"])
            if any(folder.glob("*.parquet")):
                raise UserError(
                    f"{folder} holds files of commit {shown(manifest['commit'])[:14]}, not of "
                    f"{revision}: leave --revision out, or move the folder away"
                )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} is damaged ({e}): delete it and run again; the files are then checked "
                "against the newest commit"
            ) from e
    revision = revision or "main"
    commit, files = _list(repo, revision)
    listed = [vars(f) for f in files.values()]
    manifest = {"repo": repo, "revision": revision, "commit": commit, "files": listed}
    write_json(path, manifest)
    return commit, files


def _listed(entries: Any) -> dict[str, Listed]:
    """The files in a list of objects with the fields FILE. ValueError for anything else."""
    if fault := mismatch(entries, [FILE], "files"):
        raise ValueError(fault)
    files = {}
    for entry in entries:
        if fault := missing(entry, ("path", "size")) or _unsafe(entry["path"]):
            raise ValueError(fault)
        hashes = (entry.get("sha256"), r"[0-9a-f]{64}"), (entry.get("blob"), r"[0-9a-f]{40}")
        sha256, blob = (
            value if re.fullmatch(form, value or "") else None for value, form in hashes
        )
        files[entry["path"]] = Listed(entry["path"], entry["size"], sha256, blob)
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents}
    if both := folders & {*files, *OWN}:
        raise ValueError(f"{shown(min(both))} is a file and a folder")
    return files


def _unsafe(path: str) -> str:
    """Why no file may be stored under this name within a folder; '' if one may."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    if {"", ".", ".."} & set(parts) or windows.drive or windows.root or "\\" in path:
        return f"the name {shown(path)} leads out of the folder"
    if not path.isprintable() or len(path) > 500 or any(len(part) > 200 for part in parts):
        return f"the name {shown(path)} is too long or not printable"
    return ""


def _commit(named: Any, wanted: str | None) -> str:
    """The commit that the hub names. ValueError if it is not a commit, or not the wanted one."""
    if not isinstance(named, str) or not re.fullmatch(r"[0-9a-f]{40}", named):
        raise ValueError(f"{shown(named)} is not a commit")
    if wanted and re.fullmatch(r"[0-9a-f]{40}", wanted) and wanted != named:
        raise ValueError(f"the hub answers with commit {named}")
    return named


def _list(repo: str, revision: str) -> tuple[str, dict[str, Listed]]:
    api = f"{_endpoint()}/api/datasets/{quote(repo)}"
    try:
        about, _ = _page(f"{api}/revision/{quote(revision, safe='')}")
        commit = _commit(about.get("sha") if isinstance(about, dict) else about, revision)
        entries: list[Any] = []
        url = f"{api}/tree/{commit}?recursive=true&expand=false"
        for _ in range(MOST_PAGES):
            page, url = _page(url)
            if fault := mismatch(page, [{"type": str, "lfs": (None, {"oid": str})}], "the list"):
                raise ValueError(fault)
            entries += page
            if len(entries) > MOST_FILES:
                raise ValueError(f"it lists more than {MOST_FILES:,} files")
            if not url:
                break
        else:
            raise ValueError(f"its list of files has more than {MOST_PAGES} pages")
        return commit, _listed(
            [
                {**entry, "sha256": (entry.get("lfs") or {}).get("oid"), "blob": entry.get("oid")}
                for entry in entries
                if entry.get("type") == "file"
            ]
        )
    except (OSError, HTTPException, ValueError) as e:
        raise UserError(
            f"cannot list {repo} at revision {revision} on {_endpoint()} ({_reason(e)}): check the "
            "name, the revision and the network and run again, or set HF_ENDPOINT to a mirror; "
            "training on your own text needs no network"
        ) from e


class _Status(OSError):
    """The hub replied with a status that is not success."""

    def __init__(self, status: int):
        super().__init__(f"HTTP status {status}")
        self.status = status


def _page(url: str) -> tuple[Any, str]:
    """The JSON of one reply of the API, and the address of the next page; '' if there is none."""
    with _get(url, 10 * STALL) as reply:
        data = reply.read(MOST_PAGE + 1)
        if len(data) > MOST_PAGE:
            raise ValueError(f"a reply of more than {MOST_PAGE:,} bytes")
        links = re.findall(r'<([^<>]*)>\s*;\s*rel="?next"?', reply.getheader("Link") or "")
    return parse_json(data), urljoin(url, links[0]) if links else ""


def _belongs(url: str) -> bool:
    """Whether an address is the endpoint's own host, or over https one of the hub's."""
    ours, theirs = urlsplit(_endpoint()), urlsplit(url)
    host = theirs.hostname or ""
    if theirs.scheme not in ("https", ours.scheme) or theirs.username:
        return False
    return host == ours.hostname or (theirs.scheme == "https" and host.endswith(HOSTS))


def _connect(
    url: str, context: ssl.SSLContext | None
) -> tuple[HTTPConnection, str, dict[str, str]]:
    """
    A connection to the host of an address, through the proxy of the environment if there is one;
    the target to request on it, and the headers for the proxy.
    """
    parts = urlsplit(url)
    host, path = parts.hostname or "", url[url.index(parts.netloc) + len(parts.netloc) :] or "/"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    named = "" if proxy_bypass(host) else getproxies().get(parts.scheme, "")
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    peer = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, port)
    headers = {}
    if proxy.username:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    if parts.scheme == "https":
        connection = HTTPSConnection(*peer, timeout=STALL, context=context)
        if proxy.hostname:
            connection.set_tunnel(host, port, headers)
        return connection, path, {}
    return HTTPConnection(*peer, timeout=STALL), url if proxy.hostname else path, headers


@contextmanager
def _get(url: str, seconds: float, start: int = 0, commit: str = "") -> Iterator[HTTPResponse]:
    """
    The reply to a GET, from byte `start` on if the server can; redirects are followed. The
    connection is closed after `seconds`, even if bytes still arrive. Raises OSError or
    HTTPException, _Status for a reply without success, and ValueError for one that says that it
    belongs to another commit than `commit`.
    """
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    context = _certificates() if url.startswith("https:") else None
    host = urlsplit(url).hostname
    for _ in range(6):
        if not _belongs(url):
            raise OSError(f"the hub refers to {shown(url)}, which is not one of its hosts")
        connection, path, proxy_headers = _connect(url, context)
        with closing(connection), ExitStack() as stack:
            connection.connect()
            deadline = threading.Timer(seconds, _shut_down, [connection.sock])
            deadline.daemon = True
            deadline.start()
            stack.callback(deadline.cancel)
            connection.request("GET", path, headers=headers | proxy_headers)
            reply = connection.getresponse()
            answered = reply.getheader("X-Repo-Commit") or commit
            if commit and answered != commit:
                raise ValueError(f"the hub answers with commit {shown(answered)}")
            if reply.status in (200, 206):
                yield reply
                return
            if reply.status not in (301, 302, 303, 307, 308):
                raise _Status(reply.status)
            url = urljoin(url, reply.getheader("Location") or "")
        if urlsplit(url).hostname != host:  # no other host may see the user's token
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
    raise OSError("too many redirects")


def _certificates() -> ssl.SSLContext:
    import certifi  # comes with huggingface_hub; some systems have no certificates of their own

    own = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    return ssl.create_default_context(cafile=own or certifi.where())


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def download(
    repo: str, commit: str, files: Sequence[Listed], folder: Path, workers: int = 4
) -> None:
    """
    Download `files` into `folder` and verify them. Files that exist are verified, and downloaded
    again only if damaged. Raises UserError if a file cannot be downloaded; all that has arrived,
    partial files included, is kept, and the next call continues from there.
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


def _fetch(repo: str, commit: str, file: Listed, folder: Path, stop: threading.Event) -> None:
    target, part = folder / file.path, _part(file, folder)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{shown(str(target))} leads out of {folder}: remove the link there")
    if file.path in OWN or file.path.endswith(".part"):
        raise UserError(
            f"{file.path} of {repo} has the name of one of nanochat's own files: choose another "
            "data set"
        )
    if not target.is_symlink() and not _problem(target, file):
        return
    try:
        target.unlink(missing_ok=True)  # damaged, or from another commit
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:  # a folder of its name, or a file of the name of its folder
        raise UserError(
            f"cannot write {target} ({e.strerror}): remove the file or folder in its place"
        ) from e
    url = f"{_endpoint()}/datasets/{quote(repo)}/resolve/{commit}/{quote(file.path)}"
    problem, may_pass = "", True
    for attempt in range(ATTEMPTS):
        try:
            _continue(url, commit, part, file.size, stop)
        except (OSError, HTTPException, ValueError) as e:
            problem = _reason(e)
            if isinstance(e, _Status):
                may_pass = e.status >= 500 or e.status in (408, 429)
        if stop.is_set():
            raise InterruptedError
        if _size(part) >= file.size:
            problem = _problem(part, file)
            if not problem:
                os.replace(part, target)
                return
        if not 0 < _size(part) < file.size:
            part.unlink(missing_ok=True)
        if not may_pass:
            break
        stop.wait(min(30 * BACKOFF, BACKOFF * 2**attempt))
    raise UserError(
        f"cannot fetch {url} ({problem}): check the network and the revision, then run again; "
        "the download continues where it stopped"
    )


def _continue(url: str, commit: str, part: Path, size: int, stop: threading.Event) -> None:
    """
    One attempt to bring a partial file to `size` bytes; what arrives is kept, and nothing beyond
    them is written.
    """
    start = _size(part)
    with _get(url, STALL + (size - start) / SLOWEST, start, commit) as reply:
        start = start if reply.status == 206 else 0
        while not stop.is_set() and (chunk := reply.read1(CHUNK)):
            if start + len(chunk) > size:
                raise ValueError(f"the hub sends more than the {size:,} bytes that it lists")
            try:
                with open(part, "ab" if start else "wb", buffering=0) as file:
                    file.write(chunk)
            except OSError as e:
                raise disk_error(part, e) from e
            start += len(chunk)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _problem(path: Path, file: Listed) -> str:
    """What is wrong with the file at `path`; "" if it is as listed."""
    if not path.exists() or _size(path) != file.size:
        return f"{_size(path):,} bytes instead of {file.size:,}"
    if file.sha256 and sha256_file(path) != file.sha256:
        return "its SHA-256 is not the one listed"
    if not file.sha256 and file.blob:
        git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with open(path, "rb") as content:
            hashlib.file_digest(content, lambda: git)  # pyright: ignore
        if git.hexdigest() != file.blob:
            return "its git blob is not the one listed"
    return ""


def _part(file: Listed, folder: Path) -> Path:
    """The partial download of a file, whose hash in the name keeps versions apart."""
    return folder / f"{file.path}.{(file.sha256 or str(file.size))[:12]}.part"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _arrived(file: Listed, folder: Path) -> int:
    """Bytes of a file that are on the disk, complete or partial."""
    return min(file.size, _size(folder / file.path) or _size(_part(file, folder)))
