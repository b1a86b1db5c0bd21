"""
Scores a model of karpathy/nanochat for bench/race.py: runs inside a checkout of it, with its own
tokenizer and model code, and imports nothing of this project.

    cd CHECKOUT && NANOCHAT_BASE_DIR=... python .../race_head.py HELD_OUT.jsonl TAG CONTEXT OUT.json
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def chunks(ids: list[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) of at most `context` tokens each: every token after the first counts."""
    for begin in range(0, len(ids) - 1, context):
        piece = ids[begin : begin + context + 1]
        yield piece[:-1], piece[1:]


def bits_per_byte(
    texts: Iterable[str],
    encode: Callable[[str], list[int]],
    nats: Callable[[list[list[int]], list[list[int]]], float],
    context: int,
    rows: int = 8,
) -> tuple[float, int]:
    """
    (bits per byte, bytes) of the texts. encode(text) -> its tokens after <|bos|>; nats(inputs,
    targets) -> the sum of the losses of equally long rows. Both models are scored by this function.
    """
    total, size, by_length = 0.0, 0, {}
    for text in texts:
        size += len(text.encode())
        for inputs, targets in chunks(encode(text), context):
            by_length.setdefault(len(inputs), []).append((inputs, targets))
    for pieces in by_length.values():
        for begin in range(0, len(pieces), rows):
            batch = pieces[begin : begin + rows]
            total += nats([i for i, _ in batch], [t for _, t in batch])
    return total / math.log(2) / size, size


def read(path: Path) -> list[str]:
    """The texts of a .jsonl file."""
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also splits within texts
    return [json.loads(line)["text"] for line in lines if line.strip()]


def main(held_out: str, tag: str, context: str, out: str) -> None:
    import torch
    from nanochat.checkpoint_manager import load_model  # pyright: ignore[reportMissingImports]

    model, tokenizer, meta = load_model("base", torch.device("cpu"), "eval", model_tag=tag)
    bos = tokenizer.get_bos_token_id()

    @torch.no_grad()
    def nats(inputs: list[list[int]], targets: list[list[int]]) -> float:
        x, y = torch.tensor(inputs), torch.tensor(targets)
        if x.size(1) == 1:  # its forward pass needs two tokens: the second one is ignored
            x, y = x.repeat(1, 2), torch.cat([y, torch.full_like(y, -1)], dim=1)
        return float(model(x, y, loss_reduction="sum"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, prepend=bos)

    bpb, size = bits_per_byte(read(Path(held_out)), encode, nats, int(context))
    parameters = sum(p.numel() for p in model.parameters())
    result = {"bpb": bpb, "bytes": size, "parameters": parameters, "step": meta["step"]}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
