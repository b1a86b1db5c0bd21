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
    size = ["--depth=4", "--model_dim=256", "--head_dim=64", "--sequence_len=512"]
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
            *(stream(client, server.url, seed=i, **body) for i in range(count))
        )
        seconds, used = time.perf_counter() - began, server.cpu() - cpu
    tokens = sum(answer["tokens"] for answer in answers)
    return used / tokens, tokens / seconds, answers


def alone(folder: Path, rows: int, new_tokens: int = 48) -> float:
    """CPU seconds per token of the engine without a server, in a process of its own."""
    code = (
        "import sys, time, torch\n"
        "from nanochat.chat.generate import Engine\n"
        "from nanochat.model.checkpoint import load_for_inference\n"
        "rows, count = int(sys.argv[1]), int(sys.argv[2])\n"
        "loaded = load_for_inference('sft')\n"
        "engine = Engine(loaded.model.cast_for_inference(), loaded.tokenizer)\n"
        "message = {'role': 'user', 'content': 'Tell me about Mia and Ruth, please.'}\n"
        "prompt = loaded.tokenizer.render_prompt({'messages': [message]})\n"
        "def run():\n"
        "    samples = engine.generate_batch([prompt] * rows, 1, count, 1.3, 50, seed=list(range(rows)))\n"
        "    return sum(len(s.tokens) for s in samples)\n"
        "run(); began = time.process_time(); n = sum(run() for _ in range(3))\n"
        "print((time.process_time() - began) / n)\n"
    )
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(rows), str(new_tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


async def measure(server: Server, folder: Path, soak: int) -> dict:
    out: dict = {}
    await many(server, 4)  # warm up
    for rows in (1, 8, 32):
        own = alone(folder, rows)
        served, speed, _ = await many(server, rows)
        out[f"cpu_ms_per_token_{rows}"] = round(1e3 * served, 3)
        out[f"overhead_{rows}"] = f"{served / own - 1:+.1%} ({1e3 * (served - own):+.3f} ms)"
        out[f"tokens_per_second_{rows}"] = round(speed)
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
    parser.add_argument("--soak", type=int, default=200, help="requests of the soak")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.base or temporary)
        if not options.base:
            prepare(folder)
        server = Server(folder, options.port)
        try:
            out = asyncio.run(measure(server, folder, options.soak))
        finally:
            server.close()
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
