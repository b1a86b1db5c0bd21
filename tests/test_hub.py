"""data/hub.py and `python -m nanochat.dataset`, against a hub that runs on this machine."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat.base.common import UserError
from nanochat.commands import dataset as dataset_command
from nanochat.data import hub
from nanochat.data.sources import SHARD_SETS, ShardSet

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """
    The hub's API (the tree in pages of two) and its files, with ranges. `faults` are what the next
    requests for files meet: an HTTP status, ("cut", bytes), "garbage", or "Ctrl+C" here.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.ranges, self.commit = {}, [], [], True, COMMIT
        self.listed = {}  # a wrong SHA-256 for some files

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub_ = self.server
        hub_.requests.append((self.path, self.headers.get("Range")))
        if m := re.fullmatch(r"/api/datasets/karpathy/[\w-]+/revision/(.+)", self.path):
            return (
                self.reply(200, json.dumps({"id": "x/y", "sha": hub_.commit}).encode())
                if m[1] in ("main", hub_.commit)
                else self.reply(404)
            )
        if m := re.fullmatch(
            rf"/api/datasets/karpathy/[\w-]+/tree/{hub_.commit}\?recursive=(?:true|True).*?(?:&cursor=(\d+))?",
            self.path,
        ):
            at, entries = int(m[1] or 0), [{"type": "directory", "path": "data", "oid": "0"}]
            for name, data in hub_.files.items():
                sha = hub_.listed.get(name) or hashlib.sha256(data).hexdigest()
                entries.append(
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": "0",
                        "lfs": {"oid": sha, "size": len(data), "pointerSize": 100},
                    }
                )
            link = (
                {"Link": f'<{hub_.url}{self.path.split("&cursor")[0]}&cursor={at + 2}>; rel="next"'}
                if at + 2 < len(entries)
                else {}
            )
            return self.reply(200, json.dumps(entries[at : at + 2]).encode(), **link)
        folder, name = self.path.rsplit("/", 1)
        if folder.endswith(f"/resolve/{hub_.commit}") and name in hub_.files:
            return self.reply(302, Location=f"{hub_.url}/cdn/{name}")  # as the real hub does
        if folder != "/cdn":
            return self.reply(404)
        data, fault = hub_.files[name], hub_.faults.pop(0) if hub_.faults else None
        if isinstance(fault, int):
            return self.reply(fault)
        if fault == "Ctrl+C":
            os.kill(os.getpid(), signal.SIGINT)
        start = (
            int(m[1])
            if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) and hub_.ranges
            else 0
        )
        if start >= len(data):
            return self.reply(416)
        body = bytes(len(data) - start) if fault == "garbage" else data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body[: fault[1]] if isinstance(fault, tuple) else body)
        self.close_connection = True
        return None


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub()
    server.files = {f"shard_{i:05d}.parquet": bytes([i]) * (3000 + i) for i in range(6)} | {
        "README.md": b"hello"
    }
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(hub, "BACKOFF", 0.001)
    monkeypatch.setattr(hub, "CHUNK", 256)
    monkeypatch.setitem(SHARD_SETS, "climbmix", ShardSet("karpathy/climbmix-400b-shuffle", last=5))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def get(*argv):
    dataset_command.main(["--set", "climbmix", *argv])


def fetched(server):
    return [(path.rsplit("/", 1)[1], ranges) for path, ranges in server.requests if "/cdn/" in path]


def have(tmp_path):
    return {p.name: p.read_bytes() for p in (tmp_path / "shards" / "climbmix").glob("*.parquet*")}


def shards(server, *numbers):
    return {f"shard_{i:05d}.parquet": server.files[f"shard_{i:05d}.parquet"] for i in numbers}


def test_first_shards_and_always_the_last(server, tmp_path, capsys):
    get("-n", "2", "-w", "3")
    assert have(tmp_path) == shards(server, 0, 1, 5)
    assert "2 training shards" in capsys.readouterr().out
    server.requests.clear()
    get("-n", "3")
    assert fetched(server) == [("shard_00002.parquet", None)]
    get("-n", "1000")
    assert have(tmp_path) == shards(server, *range(6))


def test_resumes_in_the_middle_of_a_file(server, tmp_path):
    server.faults = [("cut", 1000), ("cut", 700), 503, 429]
    get("-n", "0")
    assert have(tmp_path) == shards(server, 5)
    ranges = [ranges for _, ranges in fetched(server)]
    first, second = (int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:3])
    assert ranges[0] is None and len(ranges) == 5
    assert 1000 - 256 < first <= 1000 < second <= 1700, "all but the last chunk of each cut"


def test_what_arrived_survives_a_failure_and_the_next_run_goes_on(server, tmp_path):
    server.faults = [("cut", 1024), *[503] * 100]
    with pytest.raises(UserError, match="the download continues where it stopped"):
        get("-n", "0")
    (part,) = have(tmp_path)
    assert part.endswith(".part") and len(have(tmp_path)[part]) == 1024
    server.requests.clear()
    server.faults = []
    get("-n", "0")
    assert fetched(server) == [("shard_00005.parquet", "bytes=1024-")]
    assert have(tmp_path) == shards(server, 5)


def test_a_server_without_ranges(server, tmp_path):
    server.ranges, server.faults = False, [("cut", 999)]
    get("-n", "0")
    assert have(tmp_path) == shards(server, 5)


def test_corrupt_data_is_fetched_again_and_never_named(server, tmp_path):
    server.faults = ["garbage"]
    get("-n", "0")
    assert have(tmp_path) == shards(server, 5)
    server.listed["shard_00000.parquet"] = "0" * 64
    (tmp_path / "shards/climbmix/manifest.json").unlink()
    with pytest.raises(UserError, match="SHA-256"):
        get("-n", "1")
    assert "shard_00000.parquet" not in have(tmp_path)


def test_damage_on_the_disk_is_found(server, tmp_path):
    get("-n", "1")
    path = tmp_path / "shards/climbmix/shard_00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    get("-n", "1")
    assert have(tmp_path) == shards(server, 0, 5)


def test_the_commit_is_pinned(server, tmp_path):
    get("-n", "0")
    server.requests.clear()
    get("-n", "0")
    assert server.requests == []  # neither the branch nor the file is asked for again
    old, server.commit = server.commit, "d" * 40
    server.files["shard_00000.parquet"] = b"newer"
    with pytest.raises(UserError, match=r"cannot fetch .*404"):
        get("-n", "1")  # this hub has forgotten the old commit: nothing of the new one sneaks in
    with pytest.raises(UserError, match=r"holds files of commit .* move the folder away"):
        get("-n", "1", "--revision", server.commit)  # those that are not replaced would stay
    for shard in (tmp_path / "shards/climbmix").glob("*.parquet"):
        shard.unlink()
    get("-n", "1", "--revision", server.commit)
    assert have(tmp_path) == shards(server, 0, 5)
    assert (
        json.loads((tmp_path / "shards/climbmix/manifest.json").read_text())["commit"]
        == server.commit
        != old
    )


def test_offline_and_unknown(server, monkeypatch):
    with pytest.raises(
        UserError, match=r"cannot list karpathy/climbmix-400b-shuffle at revision nope .*404"
    ):
        get("--revision", "nope")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot list .* on http://127\.0\.0\.1:9 "):
        get("-n", "1")


def test_without_a_network_the_command_says_what_needs_none(base, offline, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(UserError, match=r"check the name.* training on your own text needs no"):
        get("-n", "0")
    assert offline == ["huggingface.co"]
    offline.clear()


def test_a_disk_too_small(server, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="free some space"):
        get("-n", "1")


def test_interruption_keeps_everything(server, tmp_path):
    server.faults = [None, ("cut", 1024), "Ctrl+C"]
    with pytest.raises(KeyboardInterrupt):
        get("-n", "4", "-w", "1")
    before = have(tmp_path)
    assert before["shard_00000.parquet"] == server.files["shard_00000.parquet"]
    assert any(
        name.startswith("shard_00001.parquet") and len(data) >= 1024
        for name, data in before.items()
    )
    server.requests.clear()
    get("-n", "4")
    assert have(tmp_path) == shards(server, *range(4), 5)
    assert "shard_00000.parquet" not in dict(fetched(server))


def test_a_full_disk_is_an_error_in_one_sentence(server, tmp_path):
    """The partial file is a link to the device that is always full."""
    folder = tmp_path / "shards/climbmix"
    folder.mkdir(parents=True)
    digest = hashlib.sha256(server.files["shard_00005.parquet"]).hexdigest()
    (folder / f"shard_00005.parquet.{digest[:12]}.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*\.part \(No space left on device\): free"):
        get("-n", "0")


def _download(results):
    try:
        dataset_command.main(["-n", "3", "-w", "2"])
        results.put("well")
    except BaseException as e:
        results.put(repr(e))


def test_three_downloads_at_once_into_one_folder_end_well(server, tmp_path, monkeypatch):
    monkeypatch.setitem(
        SHARD_SETS, "fineweb-edu", ShardSet("karpathy/fineweb-edu-100b-shuffle", last=5)
    )
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_download, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == ["well"] * 3
    for process in processes:
        process.join(60)
    folder = tmp_path / "shards" / "fineweb-edu"
    for file in folder.glob("*.parquet"):
        assert file.read_bytes() == server.files[file.name]
    assert len(list(folder.glob("*.parquet"))) == 4 and not list(folder.glob("*.part"))
    fetched = [path for path, _ in server.requests if path.startswith("/cdn/")]
    assert len(fetched) == 4, "the second and the third found what the first had fetched"


@pytest.mark.parametrize(
    ("proxy", "entry"),
    [
        ("http://ada:p%40ss@box:3128", "Basic YWRhOnBAc3M="),
        ("ada:p%40ss@box:3128", "Basic YWRhOnBAc3M="),
        ("box:3128", None),
    ],
)
def test_proxies_with_a_password_and_without_a_scheme(monkeypatch, proxy, entry):
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": proxy, "http": proxy})
    connection, path, headers = hub._connect("http://example.org/file", None)
    assert (connection.host, connection.port, path) == ("box", 3128, "http://example.org/file")
    assert headers.get("Proxy-Authorization") == entry
    tunnel, path, headers = hub._connect("https://example.org/file", None)
    assert (tunnel.host, tunnel.port, path, headers) == ("box", 3128, "/file", {})
    assert tunnel._tunnel_headers.get("Proxy-Authorization") == entry
