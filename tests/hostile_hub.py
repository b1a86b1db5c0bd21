"""A hub on this machine that answers as a stranger might. Each attack changes what it lists or how it replies; `fetch` is what commands do."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nanochat.data import hub

COMMIT, DATA = "c" * 40, b"some rows\n" * 300
SIZE, SHA = len(DATA), hashlib.sha256(DATA).hexdigest()
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def entry(
    path: Any = "data/a.parquet",
    size: Any = SIZE,
    sha: Any = SHA,
    **more: Any,
) -> dict[str, Any]:
    return {
        "type": "file",
        "path": path,
        "size": size,
        "oid": "0",
        "lfs": {"oid": sha, "size": size},
        **more,
    }


class Hub(ThreadingHTTPServer):
    """`about`, `tree` and `file` answer the three kinds of requests; an attack replaces one of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.entries: Any = [entry()]
        self.about: Callable[[Handler], object] = lambda h: h.json({"sha": COMMIT})
        self.tree: Callable[[Handler], object] = lambda h: h.json(self.entries)
        self.file: Callable[[Handler], object] = lambda h: h.send(200, DATA)
        self.daemon_threads, self.asked = True, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, value: object, **headers: str) -> None:
        self.send(200, json.dumps(value).encode(), **headers)

    def endless(self, piece: bytes, pause: float = 0.0, most: float = 5.0, **headers: str) -> None:
        """A body without an end."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        until = time.monotonic() + most
        while time.monotonic() < until:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(pause)

    def endless_raw(self, piece: bytes, head: bytes = b"") -> None:
        """Bytes without an end, whatever HTTP says of them."""
        self.wfile.write(head)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(0.02)

    def endless_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(40):
            self.wfile.write(b"X-%d: x\r\n" % i)
            self.wfile.flush()
            time.sleep(0.1)

    def do_GET(self) -> None:
        self.server.asked += 1
        try:
            if "/tree/" in self.path:
                self.server.tree(self)
            elif "/api/" in self.path:
                self.server.about(self)
            else:
                self.server.file(self)
        except OSError:
            return  # the client has gone, as it should


Attack = Callable[[Hub], object]


def listing(*entries: Any) -> Attack:
    return lambda server: setattr(server, "entries", list(entries))


def replies(kind: str, act: Callable[[Handler], object]) -> Attack:
    return lambda server: setattr(server, kind, act)


def redirect(to: str) -> Attack:
    return replies("file", lambda h: h.send(302, Location=to))


NAMES = {
    "up": "../a", "up later": "data/../../a", "absolute": "/tmp/owned", "a drive": "C:/a", "a drive, relative": "C:a", "backslashes": "..\\..\\a", "a share": "\\\\host\\a",
    "a NUL": "a\0b", "escapes": ESCAPE, "a line break": "a\nb", "empty": "", "a dot": ".", "two dots": "..", "a slash at the end": "data/", "two slashes": "data//a", "dots within": "data/./a",
    "of 300 letters": "x" * 300, "of 5,000 letters": "x/" * 2500 + "x", "a bidi override": "a\u202ecod.exe", "half a surrogate pair": "a\ud800", "its own manifest": "manifest.json", "its own lock": ".lock", "a partial file": "a.part",
    "percent": "%2e%2e/%2e%2e/a", "a tilde": "~/a", "a home": "~root/.bashrc", "a dollar": "$HOME/a", "a link in the folder": "link/a",
}  # fmt: skip
ATTACKS: dict[str, Attack] = {
    "nothing": lambda server: None,  # which must work
    **{f"a name: {kind}": listing(entry(name)) for kind, name in NAMES.items()},
    **{f"size {size!r:.20}": listing(entry(size=size)) for size in (-1, 0, 1, 2.5, "3000", None, True, [1], 2**60, 10**400, len(DATA) - 1, len(DATA) + 1)},
    **{f"hash {sha!r:.20}": listing(entry(sha=sha)) for sha in (None, "", "x", "0" * 64, 5, ["a"], "../" * 20, ESCAPE)},
    "a wrong git blob": listing(entry(lfs=None, oid="0" * 40)),
    "a file twice": listing(entry(), entry(sha="0" * 64)),
    "entries of other shapes": listing(5, "x", None, [], {}),
    "an entry without a path": listing({"type": "file", "size": 5}),
    "no files": listing(),
    "a list that is an object": replies("tree", lambda h: h.json({"a": 1})),
    "a list that is HTML": replies("tree", lambda h: h.send(200, b"<html>")),
    "a list 100,000 deep": replies("tree", lambda h: h.send(200, b"[" * 100_000)),
    "a list without an end": replies("tree", lambda h: h.endless(b" " * 2**16)),
    "pages without an end": replies("tree", lambda h: h.json([], Link=f'<{h.path}&x=1>; rel="next"')),
    "a next page elsewhere": replies("tree", lambda h: h.json([entry()], Link='<http://192.0.2.1/x>; rel="next"')),
    "a next page in a file": replies("tree", lambda h: h.json([entry()], Link='<file:///etc/passwd>; rel="next"')),
    "a next page of the metadata server": replies("tree", lambda h: h.json([entry()], Link='<http://169.254.169.254/latest>; rel="next"')),
    "another commit": replies("about", lambda h: h.json({"sha": "d" * 40})),
    "a commit that is a path": replies("about", lambda h: h.json({"sha": "../../x"})),
    "a commit that is a number": replies("about", lambda h: h.json({"sha": 5})),
    "no commit": replies("about", lambda h: h.json({})),
    "a commit in a list": replies("about", lambda h: h.json([COMMIT])),
    "a data set of null": replies("about", lambda h: h.json(None)),
    "a page of login": replies("about", lambda h: h.send(200, b"<html>login</html>")),
    "a status of 999": replies("about", lambda h: h.send(999)),
    "a head without an end": replies("about", lambda h: h.endless_head()),
    "no HTTP at all": replies("about", lambda h: h.wfile.write(b"SSH-2.0-OpenSSH\r\n")),
    "another commit for the file": replies("file", lambda h: h.send(200, DATA, X_Repo_Commit="d" * 40)),
    "a file and a folder of one name": listing(entry("a"), entry("a/b")),
    "a folder, then a file of its name": listing(entry("a/b"), entry("a")),
    "a file under its own manifest": listing(entry("manifest.json/a")),
    "a file under its own lock": listing(entry(".lock/a")),
    "names that differ in case": listing(entry("A/x"), entry("a/x", sha="0" * 64)),
    "a name of spaces": listing(entry(" ")),
    "a name that ends in a space and a dot": listing(entry("a. ")),
    "a device of Windows": listing(entry("NUL"), entry("con.txt")),
    "a stream of Windows": listing(entry("a:b")),
    "more files than may be": listing(*[entry(f"{i}") for i in range(51)]),
    "a small file of no hash": listing(entry(lfs=None, oid=None)),
    "a git blob of a petabyte": listing(entry(lfs=None, oid="0" * 40, size=2**50)),
    "lfs a list": listing(entry(lfs=[1])),
    "lfs of another size": listing(entry(lfs={"oid": SHA, "size": 1})),
    "100 Continue without an end": replies("file", lambda h: h.endless_raw(b"HTTP/1.1 100 Continue\r\n\r\n")),
    "trailers without an end": replies("file", lambda h: h.endless_raw(b"x: y\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")),
    "a chunk of 2^70 bytes": replies("file", lambda h: h.endless_raw(b"x", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 18 + b"\r\n")),
    "a header of a megabyte": replies("file", lambda h: h.endless_raw(b"x" * 2**16, b"HTTP/1.1 200 OK\r\nX: ")),
    "a status line of escapes": replies("about", lambda h: h.wfile.write(b"HTTP/1.1 500 " + ESCAPE.encode() + b"\r\n\r\n")),
    "a redirect to a port that cannot be": redirect("http://127.0.0.1:99999/a"),
    "a redirect with a line break": redirect("http://127.0.0.1/a\r\n\r\nHost: x"),
    "a redirect to a name that is no name": redirect("http://" + "x" * 300 + ".hf.co/"),
    "a redirect to data": redirect("data:text/plain,x"),
    "a next page with a user": replies("tree", lambda h: h.json([entry()], Link='<https://huggingface.co@192.0.2.1/x>; rel="next"')),
    "a next page of broken form": replies("tree", lambda h: h.json([entry()], Link='<http://[::1>; rel="next"')),
    "a range of another file": replies("file", lambda h: h.send(206, bytes(SIZE), Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}")),
    "a redirect elsewhere": redirect("http://192.0.2.1/a"),
    "a redirect to a file": redirect("file:///etc/passwd"),
    "a redirect to ftp": redirect("ftp://127.0.0.1/a"),
    "a redirect to a name that ends alike": redirect("https://evilhf.co/a"),
    "a redirect with a user": redirect("https://huggingface.co@192.0.2.1/a"),
    "a redirect to itself": replies("file", lambda h: h.send(302, Location=h.path)),
    "a redirect to nowhere": redirect(""),
    "a redirect of broken form": redirect("http://[::1"),
    "a body that is too long": replies("file", lambda h: h.send(200, DATA * 1000)),
    "a body without an end": replies("file", lambda h: h.endless(bytes(2**16))),
    "a body byte by byte": replies("file", lambda h: h.endless(b"s", 0.05)),
    "a body that is too short": replies("file", lambda h: h.send(200, DATA[:100])),
    "a body of another file": replies("file", lambda h: h.send(200, bytes(len(DATA)))),
    "a length that lies": replies("file", lambda h: h.send(200, DATA, Content_Length="99999999999999")),
    "a length that is negative": replies("file", lambda h: h.send(200, DATA, Content_Length="-5")),
    "a length that is a text": replies("file", lambda h: h.send(200, DATA, Content_Length="x")),
    "a range nobody asked for": replies("file", lambda h: h.send(206, DATA, Content_Range="bytes 9-99/999")),
    "gzip nobody asked for": replies("file", lambda h: h.send(200, b"\x1f\x8b" + DATA, Content_Encoding="gzip")),
    "chunks of broken form": replies("file", lambda h: h.send(200, b"zz\r\nabc", Transfer_Encoding="chunked")),
    "a status of 206 without a range": replies("file", lambda h: h.send(206, DATA)),
    "a status of 304": replies("file", lambda h: h.send(304)),
    "no reply": replies("file", lambda h: h.connection.close()),
}  # fmt: skip


def fetch(folder: Path) -> list[Path]:
    """Pin and download everything listed; returns the files that are then in the folder's parent."""
    commit, files = hub.pin("some/data", folder, COMMIT)
    hub.download("some/data", commit, list(files.values()), folder)
    return [folder / name for name in files]
