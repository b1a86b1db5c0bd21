"""
Train several conditions with several seeds each and say which differences are real.

    nanochat compare --name silu --seeds 3 --common="--depth=4 --num_iterations=400" \\
        --a="" --b="--activation=silu" --names relu2 silu

The same command resumes after an interruption; more seeds or conditions extend the comparison.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.base.common import UserError, entry, opening, print0
from nanochat.base.knobs import LARGEST_SEED, knob, parse


@dataclass(kw_only=True)
class CompareKnobs:
    """Comparison"""

    name: str = knob("", "name of the comparison and its folder (default: the conditions' names)")
    common: str = knob("", "flags of base_train for every condition, in quotes")
    a: str = knob("", "flags of the first condition, the baseline")
    b: str | None = knob(None, "flags of the second condition")
    c: str | None = knob(None, "flags of the third condition")
    d: str | None = knob(None, "flags of the fourth condition")
    e: str | None = knob(None, "flags of the fifth condition")
    f: str | None = knob(None, "flags of the sixth condition")
    g: str | None = knob(None, "flags of the seventh condition")
    h: str | None = knob(None, "flags of the eighth condition")
    names: tuple[str, ...] = knob(
        (), "names of the conditions, in order (default: from their flags)"
    )
    seeds: int = knob(3, "runs per condition", low=1)
    first_seed: int = knob(
        42,
        "seed of the first run; later runs count up from it",
        low=0,
        high=LARGEST_SEED - 10_000,
    )
    target: str = knob(
        "auto",
        "target bits per byte; auto = for each pair, the final value of the worse run",
    )
    points: int = knob(20, "evaluations per run, unless the flags set --eval_every", low=2)
    eval_tokens: int = knob(
        1 << 17, "tokens per evaluation, unless the flags set --eval_tokens", low=1
    )
    keep: bool = knob(False, "keep the weights of finished runs")
    retime: int = knob(
        0,
        "after the runs, measure the speed again: so many rounds per seed, in each of which every "
        "condition takes 30 steps in turn; all reported seconds then use these times",
        low=0,
    )
    dry_run: bool = knob(
        False,
        "only show what would run and for how long, estimated from finished runs or 6 "
        "steps per condition",
    )


def with_values_attached(words: Sequence[str]) -> list[str]:
    """The words, with --b "--activation=silu" as one: its value is not a flag of compare."""
    joined: list[str] = []
    for word in words:
        if joined and re.fullmatch("--(common|[a-h])", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    words = with_values_attached(sys.argv[1:] if argv is None else argv)
    knobs, _ = parse(CompareKnobs, words, command="compare")
    opening("compare")
    if knobs.target != "auto" and not re.fullmatch(r"\d*\.?\d+", knobs.target):
        raise UserError(f"--target must be auto or a number of bits per byte (got {knobs.target})")

    from nanochat.commands.base_train import PretrainKnobs
    from nanochat.study.comparison import Comparison
    from nanochat.study.comparison_page import summary
    from nanochat.study.conditions import conditions_of

    conditions = conditions_of(knobs, PretrainKnobs)
    if knobs.retime and any(condition.budget_seconds for condition in conditions):
        raise UserError(
            "--retime does not work with --max_minutes or --max_hours, because a faster run "
            "then trains for more steps: use --num_iterations instead, or leave out --retime"
        )
    comparison = Comparison(knobs, conditions)
    with comparison.locked():
        planned, missing = len(comparison.schedule), len(comparison.missing)
        print0(f"{comparison.name}: {planned} runs, {planned - missing} finished")
        if knobs.dry_run:
            return comparison.estimate()
        comparison.run_missing()
        if knobs.retime:
            comparison.retime(knobs.retime)
        results = comparison.write()
    for pair in results["pairs"]:
        print0(summary(pair))
    print0(comparison.folder / "report.html")
    return results


if __name__ == "__main__":
    entry(main)
