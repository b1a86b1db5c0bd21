"""Look at a base model: bits per byte on the validation splits, and what it writes after a few beginnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import knobs, logbook, stage
from nanochat.common import entry, print0
from nanochat.engine import Engine
from nanochat.knobs import knob
from scripts import base_loss
from scripts.base_train import PROMPTS


@dataclass(kw_only=True)
class Knobs(base_loss.Knobs):
    """Evaluation"""

    splits: tuple[str, ...] = knob(("val",), "splits to read")
    prompts: tuple[str, ...] = knob(PROMPTS, "beginnings to go on from", alias="-p")
    max_tokens: int = knob(48, "longest continuation in tokens", alias="-m", low=1)
    temperature: float = knob(0.7, "of the second continuation; the first is greedy", alias="-t", low=0)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(Knobs, argv, command="base_eval")

    def work() -> dict[str, Any]:
        m = base_loss.measure(k)
        engine = Engine(m.model.cast_for_inference(), m.tokenizer)
        samples: dict[str, list[str]] = {p: [] for p in k.prompts}
        for temperature in (0.0, k.temperature):
            rows = engine.generate_batch(
                [m.tokenizer.encode(p, bos=True) for p in k.prompts], max_tokens=k.max_tokens, temperature=temperature, seed=k.seed
            )
            for prompt, row in zip(k.prompts, rows, strict=True):
                samples[prompt].append(m.tokenizer.decode(row.tokens))
        for prompt, texts in samples.items():
            print0(*(f"\n{prompt}|{text}" for text in texts), sep="")
        with logbook.Logbook(m.path.parent) as log:
            log.log(kind="base_eval", step=m.meta["step"], val_bpb=m.bpb, samples=samples)
        return {"bpb": m.bpb, "samples": samples}

    return stage.finish(work)


if __name__ == "__main__":
    entry(main)
