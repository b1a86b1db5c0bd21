"""
The sweeps behind the rules of nanochat/train/scaling.py for budgets of minutes, and behind
runs/english_chat.toml; dev/LOG.md says which ones were run.

    python dev/budget_experiments.py --texts DIR
    python dev/budget_experiments.py --texts DIR --only batch size

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %). If the budget is time, run nothing else on
the machine. Each experiment is one comparison (trials.py).
"""

import shlex
from typing import NamedTuple

import trials

from nanochat.train.scaling import embedding_rate

EVALUATION = "--eval_tokens=32768 --sample_every=0 --compile=on --eval_every=0.1"
SHAPE = "--depth=3 --model_dim=192 --head_dim=64"  # 1.3 M matrix parameters
MINUTES = f"--sequence_len=512 --max_minutes=3 {EVALUATION}".replace(
    "0.1", "0.5"
)  # the time includes evaluations
LONGER = f"--sequence_len=512 --max_minutes=3.5 {EVALUATION}"
STEPS = f"--sequence_len=512 --num_iterations=300 {EVALUATION}".replace("0.1", "0.5")
# 2.4 M matrix parameters, 2.1 M in the head
ENGLISH = "--depth=3 --model_dim=256 --head_dim=32 --embedding_lr=0.05 --total_batch_size=2048"
ALONE = {
    "tied": "--tie_embeddings",
    "mlp3": "--mlp_ratio=3",
    "gqa": "--kv_ratio=0.25",
    "silu": "--activation=silu",
    "gelu": "--activation=gelu",
    "nocap": "--softcap=0",
}
CAPPED = {"capped": " ".join(ALONE[n] for n in ("tied", "mlp3", "gqa", "silu"))}
ALL = {"all": f"{CAPPED['capped']} --softcap=0"}


class Experiment(NamedTuple):
    vocab: int
    common: str
    seeds: int
    conditions: dict[str, str]  # the first is the baseline
    related: tuple[str, ...] = ()  # experiments with runs of the same conditions


def four(batch: int) -> str:
    """Four million tokens in steps of `batch` tokens."""
    return f"--total_batch_size={batch} --num_iterations={4_000_000 // batch}"


EXPERIMENTS = {
    "batch": Experiment(
        4096,
        f"{SHAPE} {MINUTES}",
        2,
        {
            str(b): f"--total_batch_size={b} --embedding_lr={embedding_rate(b):.3g}"
            for b in (4096, 1024, 2048, 8192)
        },
    ),
    "rates": Experiment(
        4096,
        f"{SHAPE} --sequence_len=512 {EVALUATION}",
        2,
        {
            "4096": f"{four(4096)} --embedding_lr=0.05",
            "4096-slow": f"{four(4096)} --embedding_lr=0.05 --matrix_lr=0.01",
            "4096-falling": f"{four(4096)} --embedding_lr=0.05 --warmdown_ratio=0.8",
            "8192": f"{four(8192)} --embedding_lr=0.0707",
            "8192-slow": f"{four(8192)} --embedding_lr=0.0707 --matrix_lr=0.01",
            "8192-falling": f"{four(8192)} --embedding_lr=0.0707 --warmdown_ratio=0.8",
            "16384": f"{four(16384)} --embedding_lr=0.1",
        },
    ),
    "size": Experiment(
        4096,
        f"--total_batch_size=4096 --embedding_lr=0.05 {LONGER}",
        2,
        {
            f"{d}x{w}": f"--depth={d} --model_dim={w} --head_dim=64"
            for d, w in ((3, 192), (1, 128), (2, 128), (2, 256), (4, 256), (6, 320))
        },
    ),
    "english-tokens": Experiment(8192, f"{ENGLISH} {STEPS}", 2, {"default": "", **ALONE, **ALL}),
    "english-minutes": Experiment(8192, f"{ENGLISH} {MINUTES}", 2, {"default": "", **ALONE, **ALL}),
    "softcap-tokens": Experiment(
        8192, f"{ENGLISH} {STEPS}", 2, {**ALL, **CAPPED}, ("budget_english-tokens",)
    ),
    "softcap-minutes": Experiment(
        8192, f"{ENGLISH} {MINUTES}", 2, {"default": "", **ALL, **CAPPED}
    ),  # all timed in one hour, so no related runs
}


def main() -> None:
    options = trials.command_line(
        __doc__ or "", "budget_experiments", list(EXPERIMENTS)
    ).parse_args()
    for name in options.only:
        experiment = EXPERIMENTS[name]
        base = options.base.resolve() / f"prose-{experiment.vocab}"
        data = trials.prepared("prose", options.texts.resolve(), base, experiment.vocab)
        wanted = {
            n: flags
            for n, flags in experiment.conditions.items()
            if n in (options.conditions or experiment.conditions)
        }
        trials.compare(
            f"budget_{name}",
            base,
            f"{experiment.common} --data {shlex.join(data)}",
            experiment.seeds,
            wanted,
            experiment.related,
            options.retime,
        )


if __name__ == "__main__":
    main()
