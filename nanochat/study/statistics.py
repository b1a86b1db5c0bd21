"""
The statistics of a comparison: where learning curves cross a target, paired differences over seeds
with intervals, and verdicts.

A difference that seed noise can explain is not called real, curves are never extrapolated, and
failed runs are never left out.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval; verdicts use 1 - LEVEL
Record = Mapping[str, Any]  # as records.record gives it
Result = dict[str, Any]  # figures by name, as in results.json
Pairs = Sequence[tuple[Record, Record]]  # (run of the baseline, run of the condition) by seed


class Measure(NamedTuple):
    """Something that two conditions are compared by."""

    title: str
    more_is_better: bool
    form: str  # the format of its numbers


MEASURES = {
    "final_bpb_delta": Measure("final bits per byte, change", False, "+.4f"),
    "saved_tokens_pct": Measure("tokens saved, %", True, "+.1f"),
    "saved_seconds_pct": Measure("training seconds saved, %", True, "+.1f"),
    "step_time_pct": Measure("step time, change in %", False, "+.1f"),
}


class Crossing(NamedTuple):
    """
    Where a curve falls to a target. `bound` is "" if that is known, ">" if it is beyond the end of
    the curve, and "<" if it is before its first evaluation.
    """

    steps: float
    tokens: float
    seconds: float
    bound: str = ""


def crossing(curve: Sequence[Sequence[float]], target: float) -> Crossing:
    """
    Where the curve of a record first is at `target` bits per byte or below, interpolated linearly
    in the logarithm of tokens between two evaluations.
    """
    points = [point for point in curve if point[1] > 0]
    i = next((i for i, point in enumerate(points) if point[3] <= target), None)
    if i is None:
        return Crossing(*points[-1][:3], bound=">")
    if points[i][3] == target or i == 0:
        return Crossing(*points[i][:3], bound="" if points[i][3] == target else "<")
    before, after = np.array(points[i - 1 : i + 1], float)
    growth = after[1] / before[1]  # of the tokens
    crossed = growth ** ((before[3] - target) / (before[3] - after[3]))
    share = (crossed - 1) / (growth - 1)
    return Crossing(*(before + share * (after - before))[:3].tolist())


def interval(values: Sequence[float]) -> Result:
    """
    {n, mean, lo, hi, p}: the 95 % t interval is lo to hi, and p is the two-sided p value for a mean
    of 0. With one value, lo, hi and p are None; with none, the mean is None too.
    """
    n = len(values)
    mean = fmean(values) if n else None
    if mean is None or n < 2:
        return {"n": n, "mean": mean, "lo": None, "hi": None, "p": None}
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return {"n": n, "mean": mean, "lo": mean - half, "hi": mean + half, "p": p}


def ratio_interval(ratios: Sequence[tuple[float, str]], sign: int = 1) -> Result:
    """
    interval() of the logarithms of ratios, converted to a change in percent or, with sign -1, to
    percent saved. A ratio is (value, bound). If one has the bound ">" or "<", there is no mean; if
    all bounds have the same direction, there is a bound of the mean, `at_least` or `at_most`.
    """

    def percent(logarithm: float | None) -> float | None:
        return None if logarithm is None else sign * 100 * math.expm1(logarithm) + 0.0  # no -0

    result = interval([math.log(ratio) for ratio, _ in ratios])
    mean, lo, hi = (percent(result[name]) for name in ("mean", "lo", "hi"))
    if sign < 0:
        lo, hi = hi, lo
    bounds = [bound for _, bound in ratios if bound]
    if not bounds:
        return result | {"mean": mean, "lo": lo, "hi": hi}
    result |= {"mean": None, "lo": None, "hi": None, "p": None, "censored": len(bounds)}
    if set(bounds) in ({">"}, {"<"}):
        result["at_least" if (bounds[0] == ">") == (sign > 0) else "at_most"] = mean
    return result


def spread(values: Sequence[float]) -> Result:
    """The standard deviation over seeds with its 95 % interval (chi-squared)."""
    n = len(values)
    if n < 2:
        return {"sd": None, "sd_lo": None, "sd_hi": None}
    sd = float(np.std(values, ddof=1))

    def bound(quantile: float) -> float:
        return sd * math.sqrt((n - 1) / float(stats.chi2.ppf(quantile, n - 1)))

    return {"sd": sd, "sd_lo": bound((1 + LEVEL) / 2), "sd_hi": bound((1 - LEVEL) / 2)}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number by Holm's step-down method; None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, i) in enumerate(known):
        adjusted[i] = worst = max(worst, min(1.0, (len(known) - rank) * p))
    return adjusted


def analyse(
    runs: Sequence[Record], flags: Mapping[str, str], target: float | None = None
) -> Result:
    """
    The results of a comparison. `runs` are records with condition and seed, or for a failed run
    condition, seed and error. `flags` are by condition, the baseline first. `target` is in bits
    per byte; None takes for each pair the final bits per byte of the run that ended worse.
    """
    baseline, *others = flags
    finished: dict[str, list[Record]] = {name: [] for name in flags}
    failed: dict[str, dict[str, str]] = {name: {} for name in flags}
    for run in sorted(runs, key=lambda run: run["seed"]):
        name = run["condition"]
        if name not in flags:
            continue
        if run.get("error"):
            failed[name][str(run["seed"])] = run["error"]
        else:
            finished[name].append(run)
    pairs = {name: paired(finished[baseline], finished[name]) for name in flags}
    conditions = [
        {"name": name, "flags": flags[name], "failed": failed[name]}
        | _summary(finished[name], pairs[name], target)
        for name in flags
    ]
    differences = [
        {
            "name": name,
            "baseline": baseline,
            "n_seeds": len(pairs[name]),
            "failed_pairs": len(failed[name] | failed[baseline]),
        }
        | _differences(pairs[name], target)
        for name in others
    ]
    _judge(differences)
    return {
        "target": target,
        "level": LEVEL,
        "adjusted": "verdicts by Holm, intervals not",
        "conditions": conditions,
        "pairs": differences,
    }


def paired(baseline: Sequence[Record], runs: Sequence[Record]) -> Pairs:
    """(run of the baseline, run) for every seed that both have."""
    by_seed = {run["seed"]: run for run in baseline}
    return [(by_seed[run["seed"]], run) for run in runs if run["seed"] in by_seed]


def _summary(runs: Sequence[Record], pairs: Pairs, target: float | None) -> Result:
    """The figures of one condition: means, the spread of bits per byte, and the target."""
    crossings = [
        crossing(run["curve"], base["final_bpb"] if target is None else target)
        for base, run in pairs
    ]
    all_known = not any(crossed.bound for crossed in crossings)

    def mean(name: str, records: Sequence[Record] = runs) -> float | None:
        return fmean(record[name] for record in records) if records else None

    def largest(name: str) -> float | None:
        return max((run[name] for run in runs if run[name]), default=None)

    at_target = [crossed._asdict() for crossed in crossings] if all_known else []
    return {
        "n_seeds": len(runs),
        "final_bpb": {"mean": mean("final_bpb"), **spread([run["final_bpb"] for run in runs])},
        **{name: mean(name) for name in ("steps", "tokens", "step_ms", "seconds", "parameters")},
        **{name: largest(name) for name in ("wall_seconds", "peak_memory_bytes")},
        "to_target": {
            **{name: mean(name, at_target) for name in ("steps", "tokens", "seconds")},
            "reached": sum(crossed.bound != ">" for crossed in crossings),
            "of": len(crossings),
        },
    }


def _differences(pairs: Pairs, target: float | None) -> dict[str, Result]:
    """The interval of each of MEASURES over pairs (run of the baseline, run of the condition)."""
    crossings = []
    for base, run in pairs:
        goal = max(base["final_bpb"], run["final_bpb"]) if target is None else target
        crossings.append((crossing(base["curve"], goal), crossing(run["curve"], goal)))
    return {
        "final_bpb_delta": interval([b["final_bpb"] - a["final_bpb"] for a, b in pairs]),
        "saved_tokens_pct": ratio_interval([_ratio(a, b, "tokens") for a, b in crossings], -1),
        "saved_seconds_pct": ratio_interval([_ratio(a, b, "seconds") for a, b in crossings], -1),
        "step_time_pct": ratio_interval([(b["step_ms"] / a["step_ms"], "") for a, b in pairs]),
    }


def _ratio(a: Crossing, b: Crossing, unit: str) -> tuple[float, str]:
    """b / a, and whether the true ratio may be larger (">"), smaller ("<") or both ("<>")."""
    flipped = {"": "", ">": "<", "<": ">"}
    bounds = {b.bound, flipped[a.bound]} - {""}
    return getattr(b, unit) / getattr(a, unit), "".join(sorted(bounds))


def _judge(pairs: Sequence[Result]) -> None:
    """Add p_holm and verdict to each measure of the pairs, adjusted over the conditions."""
    for name, measure in MEASURES.items():
        adjusted = holm([pair[name]["p"] for pair in pairs])
        for pair, p in zip(pairs, adjusted, strict=True):
            pair[name]["p_holm"] = p
            pair[name]["verdict"] = _verdict(pair[name], measure, pair["failed_pairs"])


def _verdict(result: Result, measure: Measure, failed: int) -> str:
    if failed:
        return f"{failed} of its pairs of runs failed"
    if result.get("censored"):
        return (
            f"target not met (or before the first evaluation) in {result['censored']} "
            f"of {result['n']} pairs"
        )
    if result["n"] < 2:
        return "one seed is not evidence" if result["n"] else "no pair of runs yet"
    if result["p_holm"] >= 1 - LEVEL:
        return "no difference seen"
    return "better" if (result["mean"] > 0) == measure.more_is_better else "worse"
