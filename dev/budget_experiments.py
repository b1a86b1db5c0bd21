"""
The sweeps behind the rules of nanochat/scaling.py for budgets of minutes, and behind
runs/english_chat.toml; dev/LOG.md says which were run.

    python dev/budget_experiments.py --texts DIR
    python dev/budget_experiments.py --texts DIR --only batch size

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %). Where the budget is time, nothing else
should run on the machine. Each experiment is one comparison (trials.py).
"""

import shlex
from typing import NamedTuple

import trials

from nanochat.train.scaling import embedding_rate

LOOK = "--eval_tokens=32768 --sample_every=0 --compile=on --eval_every=0.1"
SHAPE = "--depth=3 --model_dim=192 --head_dim=64"  # 1.3 M matrix parameters
MINUTES = f"--sequence_len=512 --max_minutes=3 {LOOK}".replace(
    "0.1", "0.5"
)  # looking is part of the time
LONGER = f"--sequence_len=512 --max_minutes=3.5 {LOOK}"
STEPS = f"--sequence_len=512 --num_iterations=300 {LOOK}".replace("0.1", "0.5")
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
    kin: tuple[str, ...] = ()  # experiments that hold runs of the same conditions


def four(batch: int) -> str:
    """Four million tokens in steps of so many."""
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
        f"{SHAPE} --sequence_len=512 {LOOK}",
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
    ),  # in one hour, so no kin
}


def main() -> None:
    a = trials.command_line(__doc__ or "", "budget_experiments", list(EXPERIMENTS)).parse_args()
    for name in a.only:
        e, base = EXPERIMENTS[name], a.base.resolve() / f"prose-{EXPERIMENTS[name].vocab}"
        data = trials.prepared("prose", a.texts.resolve(), base, e.vocab)
        wanted = {
            n: flags for n, flags in e.conditions.items() if n in (a.conditions or e.conditions)
        }
        trials.compare(
            f"budget_{name}",
            base,
            f"{e.common} --data {shlex.join(data)}",
            e.seeds,
            wanted,
            e.kin,
            a.retime,
        )


if __name__ == "__main__":
    main()
