"""
Scores with their intervals, for one task and for several, and a table of the stages of a model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.base.strangers import mismatch, missing

Z95 = 1.959964  # half the width of a 95 % interval, in standard deviations
CHATCORE = "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"
Result = dict[str, Any]  # accuracy(), with more fields for several samples or several tasks
Results = dict[str, Result]  # by task or by stage
NUMBERS = "accuracy", "chance", "n", "lo", "hi"  # of every result
# The form of Verdicts.result(), as far as tables need it, and of a value under "pass"
BEST = dict.fromkeys([*NUMBERS, "different"], float)
RESULT = {**BEST, "pass": {str: BEST}}


def wilson(right: float, n: float) -> tuple[float, float]:
    """
    The 95 % score interval (Wilson 1927) of a share of `right` in n trials, which also holds near 0
    and 1. For a mean of n shares it is conservative: these vary at most as much as verdicts with
    the same mean.
    """
    if n == 0:
        return 0.0, 1.0
    share, z = right / n, Z95
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def accuracy(right: Sequence[float], chance: float, different: int = 0) -> Result:
    """
    {accuracy, n, chance, lo, hi} of n verdicts, or of n shares of right samples; lo and hi are the
    ends of the 95 % interval. If only some of the questions are `different` and the others repeat
    them (0 = all are different), the interval is that of so many questions, and the result also has
    their number.
    """
    n, share = len(right), sum(right) / max(1, len(right))
    lo, hi = wilson(share * (different or n), different or n)
    result = {"accuracy": share, "n": n, "chance": chance, "lo": lo, "hi": hi}
    if 0 < different < n:
        result["different"] = different
    return result


def centred(share: float, chance: float) -> float:
    """An accuracy on the scale where guessing is 0 and a perfect score 1."""
    return (share - chance) / (1 - chance)


def pass_at_k(n: int, right: int, k: int) -> float:
    """
    The unbiased estimate of the probability that at least one of k samples is right, given n >= k
    samples of which `right` are right (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarise(by_task: Results) -> Result:
    """
    One result for several tasks: accuracy() over all items; "centred", the mean of the tasks'
    centred accuracies; "chatcore", the same mean over the six tasks of CHATCORE, if none is
    missing; and the tasks' own results under "kinds".
    """
    tasks = by_task.values()
    n = sum(int(task["n"]) for task in tasks)
    share, chance = (
        sum(task[name] * task["n"] for task in tasks) / max(1, n) for name in ("accuracy", "chance")
    )
    above = {name: centred(task["accuracy"], task["chance"]) for name, task in by_task.items()}
    # The effective sample size: repeated questions make the mean of a task less certain than n
    # independent ones would
    variance = sum(task["n"] ** 2 / (task.get("different") or task["n"]) for task in tasks)
    effective = n * n / max(1, variance)
    lo, hi = wilson(share * effective, effective)
    summary = {"accuracy": share, "n": n, "chance": chance, "lo": lo, "hi": hi}
    summary["centred"] = sum(above.values()) / max(1, len(above))
    if above.keys() >= set(CHATCORE):
        summary["chatcore"] = sum(above[name] for name in CHATCORE) / len(CHATCORE)
    return {**summary, "kinds": dict(by_task)}


def stage_results(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Results:
    """
    The summary of each stage, from the last result of every task at the stage's last evaluated
    step; with this "step" if the stage was trained further. `logs` has the rows of each stage's
    logbook, which a stranger may have written; malformed results are left out.
    """
    stages = {}
    for stage, log in logs.items():
        rows = [row for row in log if row.get("kind") == "chat_eval"]
        step = rows[-1].get("step") if rows else None
        trained = [row.get("step") or 0 for row in log if row.get("kind") == "train"]
        tasks: Results = {}
        for row in rows:
            if row.get("step") == step:
                kinds = row.get("kinds") or {}
                tasks |= {name: result for name, result in kinds.items() if _is_result(result)}
        if tasks:
            stages[stage] = summarise(tasks)
            if step is not None and step < max(trained, default=0):
                stages[stage]["step"] = step
    return stages


def _is_result(result: Any) -> bool:
    """Whether this has the form of Verdicts.result(), with numbers in their ranges."""
    if mismatch(result, RESULT, "a result"):
        return False
    parts = [result, *result.get("pass", {}).values()]
    return not any(missing(part, NUMBERS) for part in parts) and all(
        0 <= part["accuracy"] <= 1
        and 0 <= part["chance"] <= 1
        and 0 <= part.get("different", 0) <= part["n"]
        and (part["chance"] < 1 or part is not result)  # only the best of many is always right
        for part in parts
    )


def stage_table(stages: Results) -> tuple[list[str], list[list[str]]]:
    """
    The head and the rows of a table of tasks by stages, given the stages' summaries, with pass@k
    where there are several samples. The row "all" is shown only if all stages were asked the same
    questions, and a step only if it is not the last one of its stage.
    """
    rows = []
    for name, by_stage in _results_by_name(stages).items():
        sizes = sorted({f"{result['n']:,}" for result in by_stage.values()})
        chances = sorted({f"{result['chance']:.0%}" for result in by_stage.values()})
        cells = [_accuracy(by_stage[stage]) if stage in by_stage else "" for stage in stages]
        rows.append([name, " / ".join(sizes), " / ".join(chances), *cells])
    chatcore = [f"{s['chatcore']:.4f}" if "chatcore" in s else "" for s in stages.values()]
    if any(chatcore):
        rows.append(["ChatCORE", "", "0", *chatcore])
    heads = [
        stage if s.get("step") is None else f"{stage}, step {s['step']:,}"
        for stage, s in stages.items()
    ]
    return ["task", "questions", "chance", *heads], rows


def _results_by_name(stages: Results) -> dict[str, Results]:
    """Name of a row of the table -> stage -> result."""
    results: dict[str, Results] = {}
    for stage, summary in stages.items():
        for name, result in summary["kinds"].items():
            results.setdefault(name, {})[stage] = result
            for k, best in result.get("pass", {}).items():
                results.setdefault(f"{name} pass@{k}", {})[stage] = best
    asked = [{name: task["n"] for name, task in s["kinds"].items()} for s in stages.values()]
    if all(questions == asked[0] for questions in asked):
        results["all"] = stages
    return results


def _accuracy(result: Result) -> str:
    """For example "52.0% (42%-62%)"."""
    return f"{result['accuracy']:.1%} ({result['lo']:.0%}-{result['hi']:.0%})"
