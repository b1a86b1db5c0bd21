"""
What the server adds to decoding: CPU per token, first tokens, disconnects, a soak, and fairness.

    python -m bench.serve                # trains a model for one step in a temporary folder first
    python -m bench.serve --soak 1000

Figures are ratios within one run wherever that is possible. Needs the extra `serve` and httpx.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
QUESTION = [{"role": "user", "content": "Tell me about Mia and Ruth, please."}]


def prepare(folder: Path) -> None:
    """A tokenizer and an untrained chat model of 4 layers of width 256 in a base folder."""
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    size = ["--depth=4", "--model_dim=256", "--head_dim=64", "--sequence_len=512", "--lookback=on"]
    run = ["--num_iterations=1", "--eval_every=0", "--sample_every=0", "--compile=off"]
    for words in (
        ["tok_train", "--vocab_size=2048", "--max_chars=2000000", "--data", "tinyworld"],
        ["base_train", *size, *run, "--total_batch_size=2048", "--data", "tinyworld@0.2"],
        ["chat_sft", "--source=base", *run, "--data", "tinyworld@64", "--init_lr_frac=0.001"],
    ):
        command = [sys.executable, "-m", "nanochat", *words]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


class Server:
    """`nanochat serve` as a process."""

    def __init__(self, folder: Path, port: int):
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "nanochat", "serve", f"--port={port}"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        self.watch = psutil.Process(self.process.pid)
        while True:
            with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.1)

    def cpu(self) -> float:
        times = self.watch.cpu_times()
        return times.user + times.system

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(
            next(line.split()[1] for line in lines if line.startswith(f"nanochat_{name} "))
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


async def stream(client: httpx.AsyncClient, url: str, hang_up_after: int = 0, **body) -> dict:
    """One streamed answer: seconds to its first token, tokens, text."""
    asked = {"messages": QUESTION, "temperature": 1.3, "stream": True, "max_tokens": 48, **body}
    asked["stream_options"] = {"include_usage": True}
    began, first, text, usage, events = time.perf_counter(), None, "", {}, 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as answer:
        if answer.status_code != 200:
            return {"status": answer.status_code}
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text += event["choices"][0]["delta"]["content"]
                events += 1
                if hang_up_after and events >= hang_up_after:
                    break
    return {
        "first": first,
        "tokens": usage.get("completion_tokens", 0),
        "text": text,
        "status": 200,
    }


async def many(server: Server, count: int, **body) -> tuple[float, float, list[dict]]:
    """(CPU seconds of the server per token, tokens per second, answers) for `count` clients at once."""
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=200)) as client:
        cpu, began = server.cpu(), time.perf_counter()
        answers = await asyncio.gather(
            *(stream(client, server.url, seed=i, user=str(i), **body) for i in range(count))
        )
        seconds, used = time.perf_counter() - began, server.cpu() - cpu
    tokens = sum(answer["tokens"] for answer in answers)
    return used / tokens, tokens / seconds, answers


ENGINE = """
import sys, time
from nanochat.chat.generate import Engine
from nanochat.model.checkpoint import load_for_inference
loaded = load_for_inference("sft")
engine = Engine.of(loaded)
messages = [{"role": "user", "content": "Tell me about Mia and Ruth, please."}]
prompt = loaded.tokenizer.render_prompt({"messages": messages})
for line in sys.stdin:
    rows, count = map(int, line.split())
    began = time.process_time()
    samples = engine.generate_batch(
        [prompt] * rows, 1, count, 1.3, 50, seed=list(range(rows))
    )
    used = time.process_time() - began
    tokens = sum(len(s.tokens) + (s.stop is not None) for s in samples)
    print(used / tokens, tokens, flush=True)
"""


class Alone:
    """The engine without a server, in a process of its own with the same number of threads."""

    def __init__(self, folder: Path):
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", ENGINE]
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def cpu_per_token(self, rows: int, new_tokens: int) -> tuple[float, int]:
        """(CPU seconds per token, tokens) of the answers that `many` asks the server for."""
        self.process.stdin.write(f"{rows} {new_tokens}\n")  # pyright: ignore[reportOptionalMemberAccess]
        self.process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
        seconds, tokens = self.process.stdout.readline().split()  # pyright: ignore[reportOptionalMemberAccess]
        return float(seconds), int(tokens)

    def close(self) -> None:
        self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait(20)


async def compare_cpu(server: Server, folder: Path, rounds: int, new_tokens: int) -> dict:
    """The CPU that a token costs with and without the server, in alternate rounds: medians."""
    engine, used = Alone(folder), {}
    for _ in range(rounds + 1):
        for rows in (1, 8, 32):
            own, tokens = engine.cpu_per_token(rows, new_tokens)
            served, _, _ = await many(server, rows, max_tokens=new_tokens)
            used.setdefault(rows, []).append((own, served, tokens))
    engine.close()
    out: dict = {}
    middle = {}
    for rows, all_rounds in used.items():
        rounds_after_warming = all_rounds[1:]
        own, served = (statistics.median(r[i] for r in rounds_after_warming) for i in (0, 1))
        extra = statistics.median(r[1] - r[0] for r in rounds_after_warming)
        middle[rows] = own, served
        out[f"cpu_ms_per_token_{rows}"] = {
            "engine": round(1e3 * own, 3),
            "server": round(1e3 * served, 3),
            "extra": round(1e3 * extra, 3),
            "extra_share": f"{extra / own:+.1%}",
            "of_one_row_engine": round(own / middle[1][0], 3),
            "of_one_row_server": round(served / middle[1][1], 3),
            "tokens_per_answer": round(all_rounds[0][2] / rows, 1),
        }
    return out


async def measure(server: Server, folder: Path, soak: int, rounds: int, new_tokens: int) -> dict:
    out = await compare_cpu(server, folder, rounds, new_tokens)
    if not soak:
        return out
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=200)) as client:
        firsts = [(await stream(client, server.url, seed=i))["first"] for i in range(9)]
        out["first_token_idle_ms"] = round(1e3 * sorted(firsts)[4], 1)
        running = [
            asyncio.ensure_future(stream(client, server.url, seed=i, max_tokens=400))
            for i in range(8)
        ]
        await asyncio.sleep(1.0)
        out["first_token_ninth_ms"] = round(1e3 * (await stream(client, server.url))["first"], 1)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        began = time.perf_counter()
        while server.metric("rows") and time.perf_counter() - began < 10:
            await asyncio.sleep(0.02)
        out["rows_gone_after_disconnect_s"] = round(time.perf_counter() - began, 2)
        greedy = [
            asyncio.ensure_future(stream(client, server.url, seed=i, max_tokens=100))
            for i in range(64)
        ]
        await asyncio.sleep(0.5)
        out["first_token_beside_64_s"] = round(
            (await stream(client, server.url, user="other"))["first"], 2
        )
        await asyncio.gather(*greedy)
        out |= await soaked(server, client, soak)
    return out


async def soaked(server: Server, client: httpx.AsyncClient, count: int) -> dict:
    """`count` requests, of which 30 % hang up; the others must say what they say alone."""
    draw = random.Random(1)
    expected = {i: (await stream(client, server.url, seed=i))["text"] for i in range(8)}
    memory = 0
    wrong = refused = 0
    gate = asyncio.Semaphore(24)

    async def one(i: int) -> None:
        nonlocal wrong, refused
        leaves = draw.random() < 0.3
        async with gate:
            answer = await stream(
                client, server.url, draw.randint(1, 4) if leaves else 0, seed=i % 8
            )
        refused += answer["status"] != 200
        wrong += answer["status"] == 200 and not leaves and answer["text"] != expected[i % 8]

    await asyncio.gather(*(one(i) for i in range(count // 4)))
    memory = server.watch.memory_info().rss
    await asyncio.gather(*(one(i) for i in range(count - count // 4)))
    await asyncio.sleep(0.6)
    return {
        "soak_requests": count,
        "soak_rows_left": server.metric("rows"),
        "soak_wrong": wrong,
        "soak_refused": refused,
        "soak_memory_growth": f"{server.watch.memory_info().rss / memory - 1:+.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--base", default="", help="base folder with a finetuned model")
    parser.add_argument(
        "--soak", type=int, default=200, help="requests of the soak; 0 = only the CPU comparison"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the CPU comparison")
    parser.add_argument("--new_tokens", type=int, default=100, help="limit of answers in them")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.base or temporary)
        if not options.base:
            prepare(folder)
        server = Server(folder, options.port)
        try:
            out = asyncio.run(
                measure(server, folder, options.soak, options.rounds, options.new_tokens)
            )
        finally:
            server.close()
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
