"""
Tell whether one way of training beats another: paired statistics over seeds, as JSON and as one HTML page with plots.

Everything comes from records of finished runs (a dict each, the learning curve inside), so that a comparison can be computed again from its
runs.jsonl alone. It refuses to call a win what seed noise can make, to extrapolate a curve, and to leave out a run that failed.
"""

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from nanochat.base import logbook
from nanochat.base.common import human
from nanochat.data.contexts import Contexts
from nanochat.model.checkpoint import upgraded
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.study import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.95
MEASURES = {  # name -> (what it is, whether more of it is better, how its numbers are written)
    "final_bpb_delta": ("final bits per byte, change", False, "+.4f"),
    "saved_tokens_pct": ("tokens saved, %", True, "+.1f"),
    "saved_seconds_pct": ("training seconds saved, %", True, "+.1f"),
    "step_time_pct": ("step time, change in %", False, "+.1f"),
}
NOTES = """
Differences are paired: runs of one seed see the same data in the same order and, where shapes agree, start from the same weights.
Intervals are 95 % t intervals over seeds, of savings and step times by the logarithm of the ratio. They are not adjusted for several
conditions; the verdicts are (Holm at 5 % over the conditions, each measure by itself).

Tokens and seconds are saved on the way to a target: the number that was asked for, else the final bits per byte of the run of the pair
that ended worse, so that both get there; where the condition wins it is the baseline's own. Between evaluations tokens are interpolated on
a logarithmic axis, and never beyond a curve's end. No run was shortened to its target: one of that length, its learning rate decayed,
would have got there sooner.

Seconds are those of the optimizer steps. Start-up, compilation, evaluation and saving are left out, and the first step of a process counts
as a median one; they are in the wall time. After --retime they are at the speed that was then measured, the conditions taking turns, and
not at that of a busy hour or of another machine. Bands span the seeds; around differences they are 95 % t intervals, point by point.
"""


class Reach(NamedTuple):
    """Where a curve comes down to a target. bound: "" interpolated, ">" not by the run's end, "<" before its first evaluation."""

    steps: float
    tokens: float
    seconds: float
    bound: str = ""


def record(directory: Path, **more: Any) -> dict[str, Any]:
    """
    The record of a run, whole or not, from its logbook; `more` (condition, seed, ...) comes first. curve: [step, tokens, training
    seconds, bits per byte] of every evaluation. pins: the flags that make other runs choose as this one did.
    """
    rows = logbook.read(directory)
    meta = upgraded(next(r["config"] for r in rows if r.get("kind") == "start"))
    seconds, step_seconds = _clock(rows)
    evals = [
        r for r in rows if r.get("kind") == "eval" and math.isfinite(r.get("val_bpb", math.nan))
    ]
    model = GPT.build(GPTConfig.from_dict(meta["config"]), "meta")
    last = next((r for r in reversed(rows) if r.get("kind") == "summary"), {})
    plan, contexts = (
        meta["horizon"],
        Contexts.parse(meta["knobs"].get("context_stages", ()), model.config.sequence_len),
    )
    batch = plan["rows"] * meta["config"]["sequence_len"]
    return {
        **more,
        "steps": max(seconds),
        "tokens": max((r["tokens"] for r in rows if r.get("kind") == "train"), default=0),
        "final_bpb": evals[-1]["val_bpb"] if evals and evals[-1]["step"] == max(seconds) else None,
        "step_ms": round(step_seconds * 1e3, 3),
        "seconds": round(max(seconds.values()), 3),
        "wall_seconds": last.get("seconds"),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "parameters": model.counts()["total"],
        "flops_per_token": contexts.mean(model.flops_per_token),
        "curve": [
            [r["step"], r["tokens"], round(seconds[r["step"]], 3), r["val_bpb"]] for r in evals
        ],
        "pins": {
            "dtype": meta["dtype"],
            "compile": "on" if plan["compiled"] else "off",
            "total_batch_size": batch,
        },
    }


def _clock(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[int, float], float]:
    """
    -> (step -> training seconds until its end, a median step's). tok_per_sec is the mean since a process began, so its rows give back every
    step's own time; a first step, which warms up and compiles, counts as a median one.
    """
    spans: dict[int, float] = {}
    firsts, tokens, offset, spent = set(), 0, 0, 0.0
    begun = False
    for r in rows:
        if r.get("kind") == "start":
            offset, spent, begun = tokens, 0.0, True
        elif r.get("kind") == "train":
            tokens, now = r["tokens"], (r["tokens"] - offset) / r["tok_per_sec"]
            spans[r["step"]], spent = max(0.0, now - spent), now
            if begun:
                firsts.add(r["step"])
            begun = False
    usual = median(
        [s for step, s in spans.items() if step not in firsts] or list(spans.values()) or [0.0]
    )
    out, total = {0: 0.0}, 0.0
    for step, span in spans.items():
        total += usual if step in firsts else span
        out[step] = total
    return out, usual


def at_speed(run: Mapping[str, Any], step_ms: float) -> dict[str, Any]:
    """The record of a run as if its steps had taken this long: of one that other work, or another machine, made slow."""
    share = step_ms / run["step_ms"]
    curve = [
        [step, tokens, round(seconds * share, 3), bpb]
        for step, tokens, seconds, bpb in run["curve"]
    ]
    return {
        **run,
        "retimed": True,
        "step_ms": step_ms,
        "seconds": round(run["seconds"] * share, 3),
        "curve": curve,
    }


def reach(curve: Sequence[Sequence[float]], target: float) -> Reach:
    """Where a curve (as in record) first is at the target or below: interpolated between two evaluations, linear in the log of tokens."""
    points = [p for p in curve if p[1] > 0]
    at = next((i for i, p in enumerate(points) if p[3] <= target), None)
    if at is None:
        return Reach(*points[-1][:3], bound=">")
    if at == 0 or points[at][3] == target:
        return Reach(*points[at][:3], bound="" if points[at][3] == target else "<")
    a, b = points[at - 1], points[at]
    tokens = a[1] * (b[1] / a[1]) ** ((a[3] - target) / (a[3] - b[3]))
    share = (tokens - a[1]) / (b[1] - a[1])
    return Reach(a[0] + share * (b[0] - a[0]), tokens, a[2] + share * (b[2] - a[2]))


def interval(values: Sequence[float], level: float = LEVEL) -> dict[str, Any]:
    """Mean, t interval [lo, hi] and two-sided p value of "the mean is 0"; all but the mean None for one value."""
    n = len(values)
    out: dict[str, Any] = {
        "n": n,
        "mean": fmean(values) if n else None,
        "lo": None,
        "hi": None,
        "p": None,
    }
    if n > 1:
        mean, error = out["mean"], float(np.std(values, ddof=1)) / math.sqrt(n)
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
        out |= {"lo": mean - half, "hi": mean + half, "p": p}
    return out


def _estimate(values: Sequence[float]) -> dict[str, Any]:
    """interval() of what nobody asks whether it is 0."""
    return {k: v for k, v in interval(values).items() if k != "p"}


def ratio_interval(ratios: Sequence[tuple[float, str]], sign: int = 1) -> dict[str, Any]:
    """
    interval() of ratios by their logarithms, as percent of change, or of what is saved with sign -1. A ratio is (value, bound); with ">" or
    "<" among them there is no mean, but a bound of it, at_least or at_most, where all point the same way.
    """

    def percent(x: float) -> float:
        return sign * 100 * math.expm1(x) + 0.0  # no -0

    out = interval([math.log(r) for r, _ in ratios])
    bounds = [b for _, b in ratios if b]
    if bounds:
        side = {">": 1, "<": -1}.get("".join(set(bounds)), 0) * sign
        known = {("at_least" if side > 0 else "at_most"): percent(out["mean"])} if side else {}
        return out | dict.fromkeys(("mean", "lo", "hi", "p")) | {"censored": len(bounds), **known}
    ends = sorted(percent(out[k]) for k in ("lo", "hi") if out[k] is not None) or [None, None]
    return out | {
        "mean": None if out["mean"] is None else percent(out["mean"]),
        "lo": ends[0],
        "hi": ends[1],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Standard deviation over seeds with its 95 % interval (chi-squared)."""
    n = len(values)
    if n < 2:
        return {"sd": None, "sd_lo": None, "sd_hi": None}
    sd = float(np.std(values, ddof=1))
    lo, hi = (
        sd * math.sqrt((n - 1) / float(stats.chi2.ppf(q, n - 1)))
        for q in ((1 + LEVEL) / 2, (1 - LEVEL) / 2)
    )
    return {"sd": sd, "sd_lo": lo, "sd_hi": hi}


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for being several (Holm's step-down); None stays None."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    out: list[float | None] = [None] * len(ps)
    worst = 0.0
    for rank, (p, i) in enumerate(known):
        out[i] = worst = max(worst, min(1.0, (len(known) - rank) * p))
    return out


def _verdict(found: Mapping[str, Any], more_is_better: bool, failed: int) -> str:
    if failed:
        return f"{failed} of its pairs of runs failed"
    if found.get("censored"):
        return f"target not met (or before the first evaluation) in {found['censored']} of {found['n']} pairs"
    if found["n"] < 2:
        return "one seed shows nothing" if found["n"] else "no pair of runs yet"
    if found["p_holm"] >= 1 - LEVEL:
        return "no difference seen"
    return "better" if (found["mean"] > 0) == more_is_better else "worse"


def _ratio(a: Reach, b: Reach, what: str) -> tuple[float, str]:
    """b / a, and to which side the truth may lie."""
    flipped = {"": "", ">": "<", "<": ">"}
    bounds = {b.bound, flipped[a.bound]} - {""}
    return getattr(b, what) / getattr(a, what), "".join(sorted(bounds))


def analyse(
    runs: Sequence[Mapping[str, Any]], flags: Mapping[str, str], target: float | None = None
) -> dict[str, Any]:
    """
    The results of a comparison: `runs` as record() gives them, with condition, seed and, of a failed one, error; `flags` by condition, the
    baseline first. target: bits per byte, None = for each pair the final ones of the run that ended worse.
    """
    names = list(flags)
    done = {(r["condition"], r["seed"]): r for r in runs if not r.get("error")}
    lost = {(r["condition"], r["seed"]): r["error"] for r in runs if r.get("error")}
    seeds = sorted({s for _, s in [*done, *lost]})
    conditions, pairs = [], []
    for name in names:
        mine = [done[name, s] for s in seeds if (name, s) in done]
        bpb = [r["final_bpb"] for r in mine]
        base = [
            (done[names[0], s], done[name, s])
            for s in seeds
            if (names[0], s) in done and (name, s) in done
        ]
        hits = [reach(b["curve"], a["final_bpb"] if target is None else target) for a, b in base]
        means = {
            k: fmean(r[k] for r in mine) if mine else None
            for k in ("steps", "tokens", "step_ms", "seconds", "parameters")
        }
        whole = {
            k: max((r[k] for r in mine if r[k]), default=None)
            for k in ("wall_seconds", "peak_memory_bytes")
        }
        known = hits and not any(h.bound for h in hits)
        to_target = {
            k: _estimate([getattr(h, k) for h in hits]) if known else None
            for k in ("steps", "tokens", "seconds")
        }
        to_target |= {"reached": sum(h.bound != ">" for h in hits), "of": len(hits)}
        failed = {str(s): e for (c, s), e in lost.items() if c == name}
        conditions.append(
            {
                "name": name,
                "flags": flags[name],
                "n_seeds": len(mine),
                "failed": failed,
                "final_bpb": _estimate(bpb) | spread(bpb),
            }
            | {**means, **whole, "to_target": to_target}
        )
        if name == names[0]:
            continue
        goals = [max(a["final_bpb"], b["final_bpb"]) if target is None else target for a, b in base]
        reached = [
            (reach(a["curve"], goal), reach(b["curve"], goal))
            for (a, b), goal in zip(base, goals, strict=True)
        ]
        missing = len({s for c, s in lost if c in (name, names[0])})
        found = {
            "final_bpb_delta": interval([b["final_bpb"] - a["final_bpb"] for a, b in base]),
            "saved_tokens_pct": ratio_interval([_ratio(*r, "tokens") for r in reached], -1),
            "saved_seconds_pct": ratio_interval([_ratio(*r, "seconds") for r in reached], -1),
            "step_time_pct": ratio_interval([(b["step_ms"] / a["step_ms"], "") for a, b in base]),
        }
        pairs.append(
            {
                "name": name,
                "baseline": names[0],
                "n_seeds": len(base),
                "failed_pairs": missing,
                **found,
            }
        )
    for measure, (_, more_is_better, _) in MEASURES.items():
        for pair, p in zip(pairs, holm([pair[measure]["p"] for pair in pairs]), strict=True):
            pair[measure] |= {"p_holm": p}
            pair[measure] |= {
                "verdict": _verdict(pair[measure], more_is_better, pair["failed_pairs"])
            }
    return {
        "target": target,
        "level": LEVEL,
        "adjusted": "verdicts by Holm, intervals not",
        "conditions": conditions,
        "pairs": pairs,
    }


# the page -----------------------------------------------------------------------------------------------------------------


def figure(found: Mapping[str, Any], form: str) -> str:
    """-12.3 (-15.0 to -9.6), or what is known instead."""
    for side in ("at_least", "at_most"):
        if side in found:
            return f"{side.replace('_', ' ')} {found[side]:{form}}"
    if found["mean"] is None:
        return "unknown"
    return f"{found['mean']:{form}}" + (
        f" ({found['lo']:{form}} to {found['hi']:{form}})" if found["lo"] is not None else ""
    )


def text(pair: Mapping[str, Any]) -> str:
    """What a condition does against the baseline, for a terminal."""
    lines = [
        f"  {what:<28}{figure(pair[m], form):<32}{pair[m]['verdict']}"
        for m, (what, _, form) in MEASURES.items()
    ]
    return "\n".join(
        [f"{pair['name']} against {pair['baseline']}, {pair['n_seeds']} paired seeds:", *lines]
    )


def _row(head: str, cells: Sequence[tuple[str, str]]) -> str:
    """A row of a table: its head is HTML, a cell a text and a small one under it."""
    return (
        f"<tr><th>{head}</th>"
        + "".join(f"<td>{html.escape(a)}<small>{html.escape(b)}</small></td>" for a, b in cells)
        + "</tr>"
    )


def _conditions(results: Mapping[str, Any]) -> str:
    flags = [shlex.split(c["flags"]) for c in results["conditions"]]
    shared = [f for f in flags[0] if all(f in other for other in flags)]
    rows = []
    for i, c in enumerate(results["conditions"]):
        own = shlex.join(f for f in flags[i] if f not in shared)
        cells = [
            (own, ""),
            (str(c["n_seeds"]), "; ".join(f"seed {s}: {e}" for s, e in c["failed"].items())),
        ]
        if c["n_seeds"]:
            bpb, hit = c["final_bpb"], c["to_target"]
            sd = (
                f"sd {bpb['sd']:.4f} ({bpb['sd_lo']:.4f} to {bpb['sd_hi']:.4f})"
                if bpb["sd"] is not None
                else ""
            )
            to = (f"reached by {hit['reached']} of {hit['of']}", "")
            if hit["tokens"]:
                to = (
                    f"{hit['tokens']['mean']:,.0f}",
                    f"{hit['steps']['mean']:,.0f} steps, {hit['seconds']['mean']:,.1f} s",
                )
            cells += [(f"{c['parameters']:,.0f}", human(c["peak_memory_bytes"] or 0) + "B peak")]
            cells += [
                (f"{c['tokens']:,.0f}", f"{c['steps']:,.0f} steps"),
                (f"{bpb['mean']:.4f}", sd),
                to,
            ]
            cells += [
                (f"{c['step_ms']:,.1f} ms", ""),
                (f"{c['seconds']:,.1f} s", f"{c['wall_seconds'] or 0:,.1f} s wall"),
            ]
        rows.append(_row(f"{report.chip(i)}{html.escape(c['name'])}", cells))
    goal = "the baseline's final" if results["target"] is None else f"{results['target']:g}"
    heads = (
        "condition",
        "flags",
        "seeds",
        "parameters",
        "tokens",
        "final bits per byte",
        f"tokens to {goal}",
        "step",
        "training",
    )
    return report.table(heads, rows) + f"<p>For all: {html.escape(shlex.join(shared))}</p>"


def _pairs(results: Mapping[str, Any]) -> str:
    rows = []
    for i, pair in enumerate(results["pairs"], 1):
        cells = [
            (pair[m]["verdict"], figure(pair[m], form)) for m, (_, _, form) in MEASURES.items()
        ]
        rows.append(
            _row(
                f"{report.chip(i)}{html.escape(pair['name'])}", [(str(pair["n_seeds"]), ""), *cells]
            )
        )
    return (
        report.table(
            ("against the baseline", "pairs", *(what for what, _, _ in MEASURES.values())), rows
        )
        if rows
        else ""
    )


def _together(runs: Sequence[Mapping[str, Any]], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs on the stretch of x that all cover: (points,) and bits per byte (runs, points)."""
    at = {
        "tokens": lambda r, p: p[1],
        "seconds": lambda r, p: p[2],
        "FLOPs": lambda r, p: p[1] * r["flops_per_token"],
    }[x]
    curves = [np.array([(at(r, p), p[3]) for p in r["curve"] if p[1] > 0]).T for r in runs]
    lo, hi = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    grid = np.unique(np.concatenate([c[0][(c[0] >= lo) & (c[0] <= hi)] for c in curves]))
    return grid, np.stack([np.interp(np.log(grid), np.log(c[0]), c[1]) for c in curves])


def _draw(
    ax: "Axes", bands: Mapping[str, Sequence[Any]], colours: Mapping[str, str], x: str, title: str
) -> None:
    """bands: name -> (x, middle, low, high), against x on a logarithmic axis from a twelfth of the longest run on."""
    from matplotlib.ticker import LogLocator, NullFormatter

    most = max(grid[-1] for grid, *_ in bands.values())
    power = 3 * int(math.log10(most) // 3)
    units = {
        "tokens": report.token_unit,
        "seconds": report.time_unit,
        "FLOPs": lambda _: (10.0**power, f"10^{power} FLOPs"),
    }
    unit, label = units[x](most)
    for name, (grid, middle, low, high) in bands.items():
        ax.plot(grid / unit, middle, linewidth=1.6, label=name, color=colours[name])
        ax.fill_between(grid / unit, low, high, color=colours[name], alpha=0.18, linewidth=0)
    late = np.concatenate(
        [part[grid >= most / 6] for grid, *parts in bands.values() for part in parts]
    )
    if late.size and np.ptp(late):  # the first descent would flatten the rest
        ax.set_ylim(late.min() - 0.05 * np.ptp(late), late.max() + 0.1 * np.ptp(late))
    ax.set_xscale("log")
    ax.set_xlim(left=most / unit / 12)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)
    ax.set_title(title)
    ax.legend(frameon=False)


Groups = Mapping[str, Sequence[Mapping[str, Any]]]  # the finished runs of each condition


def curves(ax: "Axes", groups: Groups, x: str = "tokens", title: str = "") -> None:
    """Learning curves with bands from the best to the worst seed, against "tokens", "seconds" or "FLOPs"."""
    lines = {name: _together(runs, x) for name, runs in groups.items() if runs}
    bands = {
        name: (grid, ys.mean(0), ys.min(0), ys.max(0))
        for name, (grid, ys) in lines.items()
        if grid.size
    }
    _draw(ax, bands, _colours(groups), x, title or f"Bits per byte against {x}")


def _colours(groups: Groups) -> dict[str, str]:
    return {name: report.LIGHT[i % len(report.LIGHT)] for i, name in enumerate(groups)}


def _plots(groups: Groups) -> list[str]:
    plots = [
        report.svg(partial(curves, groups=groups, x=x)) for x in ("tokens", "seconds", "FLOPs")
    ]
    first, *others = groups
    base, bands = {r["seed"]: r for r in groups[first]}, {}
    for name in others:
        both = [
            _together([base[r["seed"]], r], "tokens") for r in groups[name] if r["seed"] in base
        ]
        if both and (grid := both[0][0]).size:
            deltas = np.stack([np.interp(np.log(grid), np.log(g), ys[1] - ys[0]) for g, ys in both])
            found = [interval(list(d)) for d in deltas.T]
            low, high = (
                np.array([f["mean"] if f[k] is None else f[k] for f in found]) for k in ("lo", "hi")
            )
            bands[name] = grid, deltas.mean(0), low, high
    title = f"Bits per byte less those of {first}"
    return (
        [
            *plots,
            report.svg(
                partial(_draw, bands=bands, colours=_colours(groups), x="tokens", title=title)
            ),
        ]
        if bands
        else plots
    )


def build(
    name: str, results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], out: Path
) -> Path:
    """Write the page of a comparison: the verdicts, the conditions, the curves, every run."""
    groups = {
        c["name"]: [r for r in runs if r["condition"] == c["name"] and not r.get("error")]
        for c in results["conditions"]
    }
    notes = "".join(f"<p>{html.escape(t)}</p>" for t in NOTES.strip().split("\n\n"))
    plots = report.gallery(_plots(groups)) if any(groups.values()) else ""
    first = {"Found": _pairs(results), "Conditions": _conditions(results), "Curves": plots}
    return report.page(f"nanochat: {name}", {**first, "How it was computed": notes}, out)
