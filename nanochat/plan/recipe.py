"""
Choose depth, width, batch, context and length of a run for a budget of time, and write the recipe that the training commands take.

    python -m scripts.plan recipe --hours 24 --gpu rtx4090
    python -m scripts.plan recipe --minutes 20 --probe plan/probe.json
    python -m scripts.base_train --recipe plan/recipe.toml

The speed comes from a probe, from a peak measured here, or from the table of cards; the loss from a law that a pilot corrects; the memory
from a trace of the real model. Every candidate is shown with what it lost by. It refuses a budget that no model can use and a card that
holds none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from nanochat.base.common import UserError, columns, duration, human, notice, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.plan import arch, law, memory, speed
from nanochat.plan import probe as throughput
from nanochat.plan.speed import GIB, PRETRAIN, Machine
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import batch_for, context_for, context_stages, embedding_rate

ASPECTS = (48.0, 64.0, 96.0)  # widths a layer that are tried
FEWEST_STEPS = 100  # of the smallest batch: with fewer a schedule has no shape
MICRO_TOKENS = {
    "cpu": 1 << 13,
    "mps": 1 << 14,
    "cuda": 1 << 16,
}  # of a micro-batch, where no probe says better
USABLE = 0.95  # of a card's memory: the driver and the screen take some
SHORTEST = 512  # context that is tried where memory is short
MOST_TRACED = 4  # candidates that fit: their memory is looked at, the best prediction first
LOOKS = 4  # evaluations in a run, beside the one before it
LOOK_SHARE = 0.006  # of the pretraining time for each of them
OPENING = 6.0  # seconds in which a run opens its data and model and draws its samples
TIE = 0.006  # what seeds differ in: predictions nearer than this are equal, the usual shape wins, then the smaller model
REST = {
    "mid_train": 0.45,
    "chat_sft": 0.3,
}  # of what pretraining leaves; what remains is for evaluation and for starting programs


@dataclass(kw_only=True)
class Knobs(MachineKnobs, speed.BudgetKnobs, speed.OpenKnobs):
    """Recipe"""

    gpu: str = knob("", "plan for this card, for example rtx4090")
    probe: str = knob(
        "",
        "plan from this file of plan probe (default: the one in the base folder, if it is of this machine)",
    )
    memory_gb: float = knob(
        0.0, "memory of the device (default: what the card has, or what is free here)", low=0
    )
    pretrain: float = knob(PRETRAIN, "share of the budget for pretraining", low=0.1, high=1)
    total_batch_size: int = knob(0, "tokens of an optimizer step; 0 = as for the horizon", low=0)
    device_batch_size: int = knob(0, "rows of a micro-batch; 0 = the fastest that fits", low=0)
    data: tuple[str, ...] = knob((), "text to train on, as for base_train; it goes into the recipe")
    model_tag: str = knob("", "name of the model's folder; it goes into the recipe")
    out: str = knob(
        "",
        "the recipe to write, with a .json of the plan beside it (default: plan/recipe.toml in the base folder)",
    )
    json: bool = knob(False, "print JSON alone")


@dataclass
class Candidate:
    """One architecture and what the budget makes of it. Speeds in tokens a second, memory in bytes, bpb in bits per byte; lo, hi: 90 %."""

    config: GPTConfig
    n: int  # parameters of the layers
    contexts: tuple[tuple[float, int], ...]
    total: int  # tokens of a step
    rows: int  # of a micro-batch
    rate: speed.Speed
    tokens: float
    eval_tokens: int
    bpb: tuple[float, float, float]
    why: str = ""  # it lost
    memory: float = 0.0  # of the device; 0 = not looked at
    peak: float | None = None  # as the run will report it
    parameters: int = field(default=0)

    @property
    def steps(self) -> int:
        return int(self.tokens / self.total)

    @property
    def accumulation(self) -> int:
        return max(1, self.total // (self.rows * self.config.sequence_len))

    @property
    def shape(self) -> tuple[int, int]:
        return self.config.n_layer, self.config.n_embd

    def summary(self) -> dict[str, Any]:
        """What JSON says of it."""
        c = self.config
        names = {"depth": c.n_layer, "model_dim": c.n_embd, "head_dim": c.head_dim}
        names |= {"sequence_len": c.sequence_len, "contexts": self.contexts}
        batch = {
            "total_batch_size": self.total,
            "device_batch_size": self.rows,
            "steps": self.steps,
            "eval_tokens": self.eval_tokens,
        }
        figures = {
            "parameters": self.parameters,
            "layer_parameters": self.n,
            "tokens": self.tokens,
            "memory_bytes": self.memory or None,
        }
        figures |= {"peak_memory_bytes": self.peak}
        named = {
            "tok_per_sec": self.rate.tok_per_sec,
            "tok_per_sec_lo": self.rate.lo,
            "tok_per_sec_hi": self.rate.hi,
        }
        return {
            **names,
            **batch,
            **figures,
            **named,
            **dict(zip(("bpb", "bpb_lo", "bpb_hi"), self.bpb, strict=True)),
            "why": self.why,
        }


def machine_of(k: Knobs) -> Machine:
    """
    The machine that is planned for: a card by name, the machine of a probe, or this one, which is probed now if it was not before.
    UserError for two of them and for an unknown card.
    """
    if k.gpu and k.probe:
        raise UserError(f"--gpu={k.gpu} and --probe={k.probe} are two machines: give one of them")
    if k.gpu:
        try:
            found = Machine.of(arch.card(k.gpu))
        except UserError as e:
            raise UserError(
                f"{e}. Or measure yours: run plan probe on it and give the file with --probe"
            ) from None
    elif k.probe:
        found = speed.load(k.probe)
    else:
        found, file = throughput.here(k.device_type, k.dtype), speed.folder() / "probe.json"
        if file.exists():
            probed = speed.load(file)
            if (probed.name, probed.device_type, probed.dtype) == (
                found.name,
                found.device_type,
                found.dtype,
            ):
                return _with_memory(k, probed)
            notice(
                f"{file} is of {probed.name} in {probed.dtype}, not of this machine: it is measured anew"
            )
            file.rename(file.with_suffix(".old.json"))
        print0("this machine has no probe yet: a few points first (plan probe measures more)")
        shared = {
            f.name: getattr(k, f.name)
            for f in fields(throughput.Knobs)
            if hasattr(k, f.name) and f.name not in ("out", "json")
        }
        throughput.run(throughput.Knobs(**shared, device_batches=(8,)))
        found = speed.load(file)
    return _with_memory(k, found)


def _with_memory(k: Knobs, found: Machine) -> Machine:
    return replace(found, memory_bytes=k.memory_gb * GIB) if k.memory_gb else found


def candidate(
    k: Knobs,
    config: GPTConfig,
    machine: Machine,
    the_law: law.Law,
    seconds: float,
    most_rows: int = 1 << 30,
) -> Candidate:
    """What `seconds` of pretraining, evaluations and opening included, make of an architecture."""
    T, n = config.sequence_len, speed.size(config)
    staged = machine.device_type != "cpu" and seconds >= 3600
    contexts = context_stages(T) if staged and not k.sequence_len else ((0.0, T),)
    longest, total, rows = contexts[-1][1], k.total_batch_size or 1 << 14, 1
    training = max(
        0.0,
        seconds
        - OPENING
        - len(contexts) * speed.first_step(machine, speed.compiles(machine.device_type, seconds)),
    )
    tokens, rate, eval_tokens = 0.0, speed.Speed(1.0, 1.0, 1.0), 0
    for _ in range(3):  # the batch follows from the tokens, and these a little from the batch
        options = [
            1 << i for i in range(11) if (1 << i) <= most_rows and (1 << i) * T <= max(total, T)
        ]
        rows = min(k.device_batch_size, most_rows) or _rows(config, options, total, machine, T)
        rate = _mean_speed(config, contexts, rows * T, total, machine)
        share = (
            LOOK_SHARE * seconds * 2 * rate.tok_per_sec / max(1, len(k.data))
        )  # looking takes half of a training step's time a token
        eval_tokens = 1 << min(20, max(13, int(share).bit_length() - 1))
        looking = (LOOKS + 1) * max(1, len(k.data)) * eval_tokens / (2 * rate.tok_per_sec)
        tokens = max(0.0, training - looking) * rate.tok_per_sec
        total = k.total_batch_size or max(longest, batch_for(tokens) // longest * longest)
    made, parameters = the_law.interval(n, max(tokens, 1.0)), speed.counts(config)["total"]
    found = Candidate(
        config, n, contexts, total, rows, rate, tokens, eval_tokens, made, parameters=parameters
    )
    if found.steps < FEWEST_STEPS:
        found.why = f"{found.steps} steps are too few"
    return found


def _rows(config: GPTConfig, options: Sequence[int], total: int, machine: Machine, T: int) -> int:
    """Rows of a micro-batch: of those that a probe spans the fastest (fewer where that costs under 2 %), else as many as are usual."""
    seen = [p["rows"] * p["config"]["sequence_len"] for p in machine.points if "error" not in p]
    spanned = [r for r in options if seen and 0.7 * min(seen) <= r * T <= 1.5 * max(seen)]
    if not spanned:
        return max([r for r in options if r * T <= MICRO_TOKENS[machine.device_type]], default=1)
    rates = {r: speed.tokens_per_second(config, r, T, total, machine).tok_per_sec for r in spanned}
    return min(r for r in spanned if rates[r] >= 0.98 * max(rates.values()))


def _mean_speed(
    config: GPTConfig,
    contexts: Sequence[tuple[float, int]],
    micro: int,
    total: int,
    machine: Machine,
) -> speed.Speed:
    """Over the stages of a run whose progress is time; a micro-batch keeps its tokens."""
    ends = [begin for begin, _ in contexts[1:]] + [1.0]
    spans = [(end - begin, T) for end, (begin, T) in zip(ends, contexts, strict=True)]
    rates = [
        (w, speed.tokens_per_second(config, max(1, micro // T), T, total, machine))
        for w, T in spans
    ]
    return speed.Speed(
        *(sum(w * getattr(r, n) for w, r in rates) for n in ("tok_per_sec", "lo", "hi"))
    )


class Memory:
    """
    Peak memory by `plan memory`, moved by what a pilot or a probe measured above it: a process holds more than tensors. What a run reports
    of itself is on a GPU what is allocated, elsewhere the whole process.
    """

    def __init__(self, machine: Machine, compiled: bool):
        self.machine, self.compiled, self.traced = machine, compiled, {}
        self.reported = "allocated" if machine.device_type == "cuda" else "total"
        self.gap, self.margin = machine.memory_gap or 0.0, None
        good = [p for p in machine.points if "error" not in p and p["compiled"] == compiled]
        if on_card := [p for p in good if "card_bytes" in p]:
            self.margin = memory.margin_of(on_card, [p["peak_memory_bytes"] for p in on_card])
        if machine.memory_gap is None and good:
            likely = sorted(good, key=lambda p: p["rows"])[:2]
            self.gap = fmean(
                p["peak_memory_bytes"]
                - self.trace(GPTConfig(**p["config"]), p["rows"], p["accumulation"])
                for p in likely
            )

    def found(self, config: GPTConfig, rows: int, accumulation: int) -> dict[str, int]:
        key = json.dumps([asdict(config), rows, accumulation > 1])
        if key not in self.traced:
            m, more = (
                self.machine,
                {
                    "micro_batches": min(2, accumulation),
                    "compiled": self.compiled,
                    "margin": self.margin,
                },
            )
            self.traced[key] = memory.predict(
                config,
                rows,
                config.sequence_len,
                dtype=m.torch_dtype,
                device_type=m.device_type,
                **more,
            )
        return self.traced[key]

    def trace(self, config: GPTConfig, rows: int, accumulation: int) -> float:
        """Bytes that a run would report, before any correction."""
        return self.found(config, rows, accumulation)[self.reported]

    def look(self, c: "Candidate") -> None:
        """Fill in what a candidate takes of the device, and what it will report."""
        found = self.found(c.config, c.rows, c.accumulation)
        c.memory, c.peak = found["total"] + self.gap, found[self.reported] + self.gap


def candidates(k: Knobs, machine: Machine, the_law: law.Law, seconds: float) -> list[Candidate]:
    """All that are worth a look, the best prediction first; those that cannot train in the budget last. UserError when none can."""
    reach = speed.usual_share(machine) * machine.peak_flops * seconds
    T = k.sequence_len or context_for(reach)
    depths = (k.depth,) if k.depth else throughput.DEPTHS
    aspects = (k.aspect_ratio,) if k.aspect_ratio else (64.0,) if k.model_dim else ASPECTS
    configs = {
        (c.n_layer, c.n_embd): c for c in (k.config(d, a, T) for d in depths for a in aspects)
    }
    sizes = {shape: speed.size(c) for shape, c in configs.items()}
    best = sizes[min(configs, key=lambda s: speed.promise(configs[s], machine, seconds, the_law))]
    near = [s for s in configs if sizes[s] <= best * 12]  # the small ones for small memories
    found = [candidate(k, configs[s], machine, the_law, seconds) for s in near]
    found.sort(key=lambda c: (bool(c.why), c.bpb[0], c.n))
    if found[0].why:
        least = min(found, key=lambda c: c.n)
        c = least.config
        needed = (
            OPENING
            + speed.first_step(machine, False)
            + 1.3 * FEWEST_STEPS * (1 << 12) / least.rate.tok_per_sec
        )
        raise UserError(
            f"{duration(seconds)} of pretraining are too few for any model here: even depth {c.n_layer} at width {c.n_embd} with "
            f"{c.vocab_size:,} tokens makes {least.steps} steps. Give at least {max(1, round(needed / k.pretrain / 60 + 0.5))} minutes"
            + (", or a smaller vocabulary" if c.vocab_size > 4096 else "")
        )
    return found


def plan(
    k: Knobs, machine: Machine, the_law: law.Law, kept: tuple[int, int] | None = None
) -> dict[str, Any]:
    """
    {"primary", "fallback" (or None), "candidates", "seconds", "pretraining_seconds"}: candidates as Candidate. `kept` (depth, width),
    which a pilot tried, stays the primary unless another is predicted 1 % better. Where memory shuts better ones out, a shorter context is
    tried as well, which leaves room for them. UserError when the budget or the memory is too small.
    """
    seconds = speed.budget_seconds(k)
    if not seconds:
        raise UserError("nothing says how long the whole of it may take: give --hours or --minutes")
    pretraining = k.pretrain * seconds
    compiled = speed.compiles(machine.device_type, pretraining)
    alike = tuple(
        p for p in machine.points if p["compiled"] == compiled
    )  # eager and compiled steps are two machines
    machine = replace(machine, points=alike or machine.points)
    found, room, need = (
        candidates(k, machine, the_law, pretraining),
        machine.memory_bytes * USABLE,
        Memory(machine, compiled),
    )

    def fits(i: int) -> bool:
        """Trace a candidate, with fewer rows until it fits; says why it lost where it never does."""
        c = found[i]
        if any(o.why.startswith("needs") and o.parameters <= c.parameters for o in found):
            c.why = "needs more memory than a smaller one that does not fit"
            return False
        need.look(c)
        while c.memory > room and c.rows > 1 and not k.device_batch_size:
            still = (
                12 * c.parameters
            )  # weights, gradients and some of the optimizer stay; the rest follows the rows
            share = max(0.0, room - still) / max(1.0, c.memory - still)
            fewer = max(1, min(c.rows // 2, 1 << max(0, int(c.rows * share).bit_length() - 1)))
            found[i] = c = candidate(k, c.config, machine, the_law, pretraining, most_rows=fewer)
            need.look(c)
        if c.memory > room:
            c.why = f"needs {c.memory / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB"
        return not c.why

    print0("  tracing the memory of the best candidates, a few seconds each")
    fitting: list[Candidate] = []
    edge = found[0].bpb[0] * (1 + TIE)
    for i in sorted(
        range(len(found)),
        key=lambda i: (
            (0, *_simplicity(found[i])) if found[i].bpb[0] <= edge else (1, found[i].bpb[0])
        ),
    ):
        if len(fitting) < MOST_TRACED and not found[i].why and fits(i):
            fitting.append(found[i])
    if not fitting:
        least = min((c for c in found if c.memory), key=lambda c: c.memory or 0)
        raise UserError(
            f"{machine.name} has too little memory ({machine.memory_bytes / GIB:.2g} GiB): the smallest candidate, depth "
            f"{least.config.n_layer} at width {least.config.n_embd}, needs {(least.memory or 0) / GIB:.2g} GiB with {least.rows} rows "
            "at a time. Try --sequence_len=256, a smaller vocabulary, --tie_embeddings or a smaller --depth"
        )
    fitting.sort(key=lambda c: c.bpb[0])
    equal = [c for c in fitting if c.bpb[0] <= fitting[0].bpb[0] * (1 + TIE)]
    first = min(equal, key=_simplicity)
    tried = next((c for c in fitting if c.shape == kept), None)
    if tried and tried.bpb[0] <= first.bpb[0] * 1.01:
        first = tried
    small = [i for i, c in enumerate(found) if not c.why and c.n <= 2 / 3 * first.n]
    second = next((found[i] for i in small if fits(i)), None)
    T, shut_out = (
        first.config.sequence_len,
        any(c.why.startswith("needs") and c.bpb[0] < first.bpb[0] for c in found),
    )
    if shut_out and not k.sequence_len and T > SHORTEST:
        shorter = plan(replace(k, sequence_len=T // 2), machine, the_law, kept)
        if shorter["primary"].bpb[0] < first.bpb[0]:
            return shorter
    for c in found:
        c.why = c.why or _lost(c, first, second)
    return {
        "primary": first,
        "fallback": second,
        "candidates": found,
        "seconds": seconds,
        "pretraining_seconds": pretraining,
    }


def _simplicity(c: Candidate) -> tuple[bool, int]:
    """What decides between equal predictions: the usual shape, then the smaller model."""
    return abs(c.config.n_embd / c.config.n_layer - 64) > 8, c.n


def _lost(c: Candidate, first: Candidate, second: Candidate | None) -> str:
    if c is first:
        return "chosen"
    behind = c.bpb[0] - first.bpb[0]
    if c.bpb[0] <= first.bpb[0] * (1 + TIE):
        why = f"{behind:+.3f}: as good, " + ("and larger" if c.n > first.n else "in another shape")
    elif c.n > first.n:
        why = f"{behind:+.3f}: too large, {c.tokens / c.parameters:.1f} tokens a parameter"
    else:
        why = f"{behind:+.3f}: too small, {c.tokens / c.parameters:.1f} tokens a parameter"
    return "fallback: " + why if c is second else why


# the files ----------------------------------------------------------------------------------------------------------------


def toml_value(v: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(v, bool):
        return str(v).lower()
    if isinstance(v, tuple | list):
        return "[" + ", ".join(map(toml_value, v)) + "]"
    return (
        json.dumps(v, ensure_ascii=False)
        if isinstance(v, str)
        else repr(float(f"{v:.6g}") if isinstance(v, float) else v)
    )


def tables(k: Knobs, c: Candidate, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe of a candidate: flags by command."""
    seconds, pretraining = found["seconds"], found["pretraining_seconds"]
    changed = {
        f.name: getattr(c.config, f.name)
        for f in fields(ArchitectureKnobs)
        if getattr(c.config, f.name) != f.default
    }
    base: dict[str, Any] = {
        "depth": c.config.n_layer,
        "model_dim": c.config.n_embd,
        "head_dim": c.config.head_dim,
    }
    base |= {"kv_ratio": k.kv_ratio} if k.kv_ratio != 1 else {}
    base |= {**changed, "sequence_len": c.config.sequence_len}
    if len(c.contexts) > 1:
        base["context_stages"] = tuple(f"{T}@{begin:g}" for begin, T in c.contexts)
    base |= {
        "max_minutes": round(pretraining / 60, 3),
        "total_batch_size": c.total,
        "device_batch_size": c.rows,
    }
    base |= {
        "embedding_lr": embedding_rate(c.total),
        "eval_every": 1 / LOOKS,
        "eval_tokens": c.eval_tokens,
    }
    base |= {"data": k.data} if k.data else {}
    left, later = seconds - pretraining, {}
    for name, share in REST.items() if left > 30 else ():
        looks = max(1 << 12, int(c.eval_tokens * share * left / pretraining))
        later[name] = {
            "max_minutes": round(share * left / 60, 3),
            "eval_every": 0.5,
            "eval_tokens": looks,
            "warmdown_ratio": 1.0,
        }
    if later:  # rates as in the quickstart, whose chain was measured (dev/LOG.md)
        later["mid_train"]["lr_scale"] = 0.5
        later["chat_sft"]["init_lr_frac"] = 0.5
    tag = {"model_tag": k.model_tag} if k.model_tag else {}
    return {name: {**table, **tag} for name, table in {"base_train": base, **later}.items()}


def write(k: Knobs, machine: Machine, found: Mapping[str, Any], the_law: law.Law) -> dict[str, Any]:
    """Write recipe.toml, the fallback's recipe beside it and the plan as JSON; returns that."""
    out = Path(k.out).expanduser() if k.out else speed.folder() / "recipe.toml"
    compiled = speed.compiles(machine.device_type, found["pretraining_seconds"])
    files = {"primary": out, "fallback": out.with_name(f"{out.stem}-fallback{out.suffix}")}
    for role, file in files.items():
        if (c := found[role]) is None:
            file.unlink(missing_ok=True)
            continue
        head = [
            f"# {duration(found['seconds'])} on {machine.name}: {role} of plan recipe. Speed: {machine.source}.",
            f"# Predicted: {c.bpb[0]:.3f} bits per byte ({c.bpb[1]:.3f} to {c.bpb[2]:.3f}) after {human(c.tokens)} tokens at "
            f"{c.rate.tok_per_sec:,.0f} tok/s ({c.rate.lo:,.0f} to {c.rate.hi:,.0f}), {c.memory / GIB:.2f} GiB",
        ]
        text = [
            "\n".join([f"\n[{name}]", *(f"{n} = {toml_value(v)}" for n, v in t.items())])
            for name, t in tables(k, c, found).items()
        ]
        atomic_write(file, "\n".join(head + text) + "\n")
    whole = {
        "knobs": asdict(k),
        "machine": {**vars(machine), "points": len(machine.points)},
        "law": {"factor": the_law.factor, "around": the_law.around},
        "recipe": str(out),
        **{n: found[n] for n in ("seconds", "pretraining_seconds")},
        **{role: found[role].summary() if found[role] else None for role in files},
        "compiled": compiled,
        "opening_seconds": OPENING + speed.first_step(machine, compiled),
        "candidates": [c.summary() for c in found["candidates"]],
    }
    atomic_write(out.with_suffix(".json"), json.dumps(whole, indent=1))
    return whole


def show(found: Mapping[str, Any], machine: Machine, most: int = 12) -> None:
    """Print the table of candidates."""
    print0(
        f"{machine.name}, {machine.dtype}; speed: {machine.source}; {duration(found['pretraining_seconds'])} of pretraining"
    )
    rows = []
    for c in sorted(
        found["candidates"],
        key=lambda c: (c is not found["primary"], c is not found["fallback"], c.bpb[0]),
    )[:most]:
        context = " -> ".join(str(T) for _, T in c.contexts)
        memory_of = f"{c.memory / GIB:.2f} GiB" if c.memory else ""
        bpb = "{:.3f} ({:.3f}-{:.3f})".format(*c.bpb)
        size = (
            f"{c.config.n_layer} x {c.config.n_embd}",
            human(c.parameters),
            context,
            f"{c.total:,}",
            c.rows,
        )
        rows.append((*size, f"{c.rate.tok_per_sec:,.0f}", human(c.tokens), bpb, memory_of, c.why))
    heads = (
        "depth x width",
        "parameters",
        "context",
        "batch",
        "rows",
        "tok/s",
        "tokens",
        "bits per byte",
        "memory",
        "",
    )
    print0(columns(heads, rows))
    if left := len(found["candidates"]) - len(rows):
        print0(f"  and {left} more, predicted worse: all are in the plan's .json")


def run(k: Knobs) -> dict[str, Any]:
    """Print the candidates, write the recipe and the plan; returns the plan. UserError as plan() has it."""
    machine, the_law = machine_of(k), law.fitted()
    found = plan(k, machine, the_law)
    show(found, machine)
    whole = write(k, machine, found, the_law)
    print0(f"  {whole['recipe']}: --recipe for {', '.join(tables(k, found['primary'], found))}")
    print0(
        "  bits per byte are those of web text, or for minutes of English prose: plan pilot measures yours"
    )
    return whole
