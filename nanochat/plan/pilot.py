"""
Try a recipe for a short time, extrapolate to its whole budget with an interval, and correct the recipe by what was measured.

    python -m scripts.plan pilot                         the recipe in the base folder, a tenth of its time, an hour at most
    python -m scripts.plan pilot recipe.toml --minutes 5 --target_bpb 0.9

While the learning rate is high a loss lies above what the same tokens give once the rate has fallen, so a curve cut short says too little.
A pilot is therefore several short runs (lengths 1 : 2 : 4), each with the recipe's whole schedule laid over its own length, of which only
the decayed ends are fitted: L(D) = F + S D^-p. So few points do not tell F from p; what they leave open is taken from the law of plan
recipe, with the doubt that it deserves, and the interval is that of resampled ends, exponents and floors. It refuses runs too short to
be fitted.
"""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares

from nanochat.base import logbook
from nanochat.base.common import UserError, columns, duration, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.model.checkpoint import list_checkpoints
from nanochat.model.config import GPTConfig
from nanochat.model.stages import run_directory
from nanochat.plan import law, recipe, speed
from nanochat.plan.probe import process
from nanochat.plan.speed import GIB, Machine
from nanochat.study import page
from nanochat.study.records import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARE, MOST = 0.1, 3600.0  # of the pretraining time, and seconds, for all runs together
FEWEST_STEPS = 16  # of the shortest run
NOISE = 0.005  # relative standard deviation of a run's end, seed and validation text together: a judgement
DOUBT = (
    0.8,
    0.35,
)  # standard deviations of what the law says of the floor (logit of its share) and of the exponent (logarithm)
DRAWS = 8000


@dataclass(kw_only=True)
class Knobs:
    """Pilot"""

    plan: str = knob(
        "",
        "recipe to try, its plan (.json) beside it (default: plan/recipe.toml in the base folder)",
        positional=True,
    )
    minutes: float = knob(
        0.0,
        "time for all runs together (0 = a tenth of the pretraining time, an hour at most)",
        low=0,
    )
    runs: int = knob(
        3,
        "short runs, each twice as long as the one before; two where the time is short",
        low=2,
        high=6,
    )
    target_bpb: float = knob(
        0.0, "bits per byte that are wanted: says whether the budget reaches them", low=0
    )
    keep: bool = knob(False, "keep the weights of the short runs")
    json: bool = knob(False, "print JSON alone")


@dataclass(frozen=True)
class Fit:
    """L(D) = level (share + (1 - share) (D / tokens)^-power), and its value at a target with a 90 % interval."""

    level: float
    share: float  # of level, the part that more tokens do not remove
    power: float
    tokens: float
    bpb: float
    lo: float
    hi: float

    def at(self, d: float) -> float:
        return self.level * (self.share + (1 - self.share) * (d / self.tokens) ** -self.power)


def fit_curve(
    tokens: Sequence[float],
    bpb: Sequence[float],
    target: float,
    share: float,
    power: float,
    seed: int = 0,
) -> Fit:
    """
    Fit the decayed ends (tokens, bits per byte) of runs and extrapolate to `target` tokens. `share` and `power` are what the law expects at
    the longest run. The curve is that of least squares; value and interval come from DRAWS curves around the law, resampled by how well
    they meet the ends (to NOISE, or to the residuals if these are larger), each with the noise of the run that is predicted. UserError for
    ends that do not fall.
    """
    d, y = np.array(tokens, dtype=float), np.log(np.array(bpb, dtype=float))
    if len(d) < 2 or not np.isfinite(y).all() or y[d.argmax()] >= y[d.argmin()]:
        ends = ", ".join(f"{human(t)} tokens {b:.4f}" for t, b in zip(tokens, bpb, strict=True))
        raise UserError(
            f"the pilot's longer runs are not better ({ends}): give it more --minutes, or lower the learning rates"
        )
    x = np.log(d / d.max())
    expected = np.array([math.log(share / (1 - share)), math.log(power)])

    def fall(p: np.ndarray, x: np.ndarray | float) -> np.ndarray:
        """Logarithm of the loss over that of the longest run; p (..., 2): logit of the floor's share, logarithm of the exponent."""
        part = 1 / (1 + np.exp(-p[..., :1]))
        return np.log(part + (1 - part) * np.exp(-np.exp(p[..., 1:]) * x))

    best = least_squares(
        lambda p: np.concatenate([(p[0] + fall(p[1:], x) - y) / NOISE, (p[1:] - expected) / DOUBT]),
        [y[d.argmax()], *expected],
    ).x
    noise = max(
        NOISE, float(np.sqrt(np.sum((best[0] + fall(best[1:], x) - y) ** 2) / max(1, len(d) - 1)))
    )
    rng = np.random.default_rng(seed)
    drawn = expected + np.array(DOUBT) * rng.standard_normal((DRAWS, 2))
    above = y - fall(drawn, x)  # what each end says of the level
    level = above.mean(-1)
    odds = -0.5 * np.sum((above - level[:, None]) ** 2, -1) / noise**2
    likely = np.exp(odds - odds.max())
    taken = rng.choice(DRAWS, DRAWS, p=likely / likely.sum())
    scatter = noise * (
        rng.standard_normal(DRAWS) / math.sqrt(len(d)) + rng.standard_normal(DRAWS)
    )  # of the level, and of the run itself
    where = math.log(target / d.max())
    lo, middle, hi = np.exp(
        np.quantile(level[taken] + fall(drawn[taken], where)[:, 0] + scatter, [0.05, 0.5, 0.95])
    ).tolist()
    share = float(1 / (1 + np.exp(-best[1])))
    return Fit(math.exp(best[0]), share, math.exp(best[2]), float(d.max()), middle, lo, hi)


# running ------------------------------------------------------------------------------------------------------------------


def opened(k: Knobs) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(recipe file, its base_train table, its plan). UserError when one is missing."""
    file = Path(k.plan).expanduser() if k.plan else speed.folder() / "recipe.toml"
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        found = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return (
            file,
            tables["base_train"],
            {**found, "opening_seconds": float(found["opening_seconds"])},
        )  # older plans do not have it
    except OSError as e:
        raise UserError(
            f"cannot read {e.filename} ({e.strerror}): make a recipe with python -m scripts.plan recipe --hours N"
        ) from None
    except (ValueError, KeyError) as e:
        raise UserError(
            f"{file} and its .json are not what plan recipe writes ({type(e).__name__}: {e}): make them anew"
        ) from None


def lengths(found: Mapping[str, Any], seconds: float, runs: int) -> list[int]:
    """
    Steps of the short runs, 1 : 2 : 4 ..., that take `seconds` in all; of fewer runs where the shortest would be too short to be fitted.
    UserError when it would be so of two.
    """
    first = found["primary"]
    step = first["total_batch_size"] / first["tok_per_sec"]
    parts = [1 << i for i in range(runs)]
    looks = (
        2 * max(1, len(found["knobs"]["data"])) * first["eval_tokens"] / (2 * first["tok_per_sec"])
    )
    beside = runs * (found["opening_seconds"] + looks)
    unit = (seconds - beside) / step / sum(parts)
    unit = min(unit, first["steps"] / 2 / parts[-1])
    if unit < FEWEST_STEPS:
        if runs > 2:
            return lengths(found, seconds, runs - 1)
        least = FEWEST_STEPS * step * sum(parts) + beside
        if FEWEST_STEPS * parts[-1] * 2 > first["steps"]:
            raise UserError(
                f"a run of {first['steps']} steps is too short for a pilot of it: it takes hardly longer than the pilot would"
            )
        raise UserError(
            f"{duration(seconds)} give runs of {', '.join(str(max(0, int(unit * p))) for p in parts)} steps, too short to be fitted: "
            f"give at least --minutes={math.ceil(least / 6) / 10:g}"
        )
    return [int(unit * p) for p in parts]


def train(words: Sequence[str], quiet: bool) -> None:
    """base_train in its own process. UserError when it fails; interrupted, it saves itself first, and the same command goes on with it."""
    out = sys.stderr if quiet else sys.stdout
    with subprocess.Popen(
        **process("nanochat.commands.base_train", *words), stdout=out, start_new_session=True
    ) as p:
        try:
            status = p.wait()
        except BaseException:
            p.send_signal(signal.SIGINT)
            p.wait()
            raise
    if status:
        raise UserError(f"a run of the pilot ended with status {status}: what it said stands above")


def short_run(file: Path, steps: int, tag: str, compiled: bool, quiet: bool) -> Path:
    """The folder of a run of so many steps with the recipe's own schedule over them, trained unless it is there."""
    directory = run_directory("base", tag)
    if not any(
        r.get("kind") == "summary" and r.get("step") == steps for r in logbook.read(directory)
    ):
        length = [
            "--max_minutes=0",
            "--max_hours=0",
            f"--num_iterations={steps}",
            f"--model_tag={tag}",
            "--resume=auto",
        ]
        looks = [
            "--eval_every=0",
            "--sample_every=0",
            "--keep=1",
            "--run=dummy",
            f"--compile={'on' if compiled else 'off'}",
        ]
        train(["--recipe", str(file), *length, *looks], quiet)
    return directory


def measured(directory: Path) -> dict[str, Any]:
    """What a finished run says of itself; tok_per_sec is by the clock, the first step (which compiles) left out."""
    rows = [r for r in logbook.read(directory) if r.get("kind") == "train"]
    seconds, tokens = (
        rows[-1]["seconds"] - rows[0]["seconds"],
        rows[-1]["tokens"] - rows[0]["tokens"],
    )
    found = record(directory)
    return {n: found[n] for n in ("steps", "tokens", "final_bpb", "peak_memory_bytes")} | {
        "tok_per_sec": tokens / max(seconds, 1e-9)
    }


def verdict(target: float, c: recipe.Candidate, the_law: law.Law) -> str:
    """Whether the budget reaches a target, in words."""
    middle, lo, hi = c.bpb
    expected = f"{middle:.3f} ({lo:.3f} to {hi:.3f}) are expected"
    if target >= hi:
        return f"{target:g} bits per byte are within reach: {expected}"
    if target >= lo:
        return f"{target:g} bits per byte are uncertain: {expected}"
    flops, times = 6 * c.n * c.tokens, np.geomspace(1, 1e4, 200)
    enough = next((m for m in times if the_law.bpb(*the_law.best(m * flops)) <= target), None)
    more = (
        f"about {enough:.2g} times the budget would do"
        if enough
        else "no budget within 10,000 times this one reaches them on this text"
    )
    return f"{target:g} bits per byte are out of reach: {expected}; {more}"


def knobs_of(found: Mapping[str, Any]) -> recipe.Knobs:
    """The knobs that a plan was made with."""
    known = {f.name for f in fields(recipe.Knobs)}
    given: dict[str, Any] = {
        n: tuple(v) if isinstance(v, list) else v for n, v in found["knobs"].items() if n in known
    }
    return recipe.Knobs(**given)


def run(k: Knobs) -> dict[str, Any]:
    """Train the short runs, fit and extrapolate, write the corrected recipe; returns what was found."""
    file, table, found = opened(k)
    first, pretraining = found["primary"], found["pretraining_seconds"]
    seconds = k.minutes * 60 or min(SHARE * pretraining, MOST)
    name = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:8]
    steps = lengths(found, seconds, k.runs)
    print0(
        f"pilot of {file}: runs of {', '.join(f'{n:,}' for n in steps)} of {first['steps']:,} steps, about {duration(seconds)}"
    )
    runs, directory = [], file.parent
    for n in steps:
        directory = short_run(file, n, f"pilot-{name}-{n}", found["compiled"], k.json)
        runs.append(measured(directory))
        for stored in () if k.keep else list_checkpoints(directory):
            shutil.rmtree(stored.path)
    if any(r["final_bpb"] is None for r in runs):
        raise UserError(
            "a run of the pilot has no bits per byte: the validation text holds nothing that counts"
        )
    plain = law.fitted()
    n, last = first["layer_parameters"], runs[-1]
    ratio = last["tok_per_sec"] / first["tok_per_sec"]
    machine, k2 = _machine(found, ratio), replace(knobs_of(found), out=str(file))
    tokens = first["tokens"] * ratio
    ends = [(r["tokens"], r["final_bpb"]) for r in runs]
    fit = fit_curve(
        [t for t, _ in ends], [b for _, b in ends], tokens, plain.share(n, last["tokens"]), plain.b
    )
    the_law = plain.moved(n, tokens, (fit.bpb, fit.lo, fit.hi))
    start = next(r for r in logbook.read(directory) if r.get("kind") == "start")
    config = GPTConfig.from_dict(start["config"]["config"])
    accumulation = max(
        1, first["total_batch_size"] // (first["device_batch_size"] * config.sequence_len)
    )
    traced = recipe.Memory(replace(machine, memory_gap=0.0), found["compiled"]).trace(
        config, first["device_batch_size"], accumulation
    )
    machine = replace(machine, memory_gap=last["peak_memory_bytes"] - traced)
    tried = config.n_layer, config.n_embd
    again = recipe.plan(k2, machine, the_law, kept=tried)
    recipe.show(again, machine)
    chosen = again["primary"]
    whole = recipe.write(k2, machine, again, the_law)
    out: dict[str, Any] = {
        "runs": runs,
        "fit": vars(fit),
        "speed_ratio": ratio,
        "changed": chosen.shape != tried,
    }
    out |= {"recipe": whole["recipe"], "memory_bytes": last["peak_memory_bytes"]}
    out |= {"predicted_before": first["bpb"], "predicted": whole["primary"]}
    _say(out, first, chosen, ends)
    if k.target_bpb:
        out["target"] = verdict(k.target_bpb, chosen, the_law)
        print0("  " + out["target"])
    atomic_write(file.with_name("pilot.json"), json.dumps(out, indent=1))
    print0(f"  {_page(ends, fit, tokens, file.with_name('pilot.html'))}")
    return out


def _machine(found: Mapping[str, Any], ratio: float) -> Machine:
    """The machine of a plan, with the speed that the pilot measured."""
    told = {n: v for n, v in found["machine"].items() if n != "points"}
    points = (
        speed.load(found["knobs"]["probe"] or speed.folder() / "probe.json").points
        if found["machine"]["points"]
        else ()
    )
    return Machine(**{**told, "points": points, "factor": told["factor"] * ratio})


def _say(
    out: Mapping[str, Any],
    before: Mapping[str, Any],
    chosen: recipe.Candidate,
    ends: Sequence[tuple[float, float]],
) -> None:
    rows = [(human(t), f"{b:.4f}") for t, b in ends]
    print0(columns(("tokens", "bits per byte"), rows))
    f = out["fit"]
    print0(
        f"  L(D) = {f['level'] * f['share']:.3f} + {f['level'] * (1 - f['share']):.3f} (D / {human(f['tokens'])})^-{f['power']:.3f}; "
        f"the whole budget: {f['bpb']:.3f} bits per byte ({f['lo']:.3f} to {f['hi']:.3f}); the law said {out['predicted_before']:.3f}"
    )
    print0(
        f"  speed {out['speed_ratio']:.2f} times what was predicted; peak memory {out['memory_bytes'] / GIB:.2f} GiB, predicted "
        f"{before['peak_memory_bytes'] / GIB:.2f}"
    )
    kept = (
        "another model is better now, and has not been tried"
        if out["changed"]
        else "the recipe keeps its model"
    )
    print0(
        f"  {kept}: depth {chosen.config.n_layer}, width {chosen.config.n_embd}; {out['recipe']} is corrected"
    )


def _page(ends: Sequence[tuple[float, float]], fit: Fit, tokens: float, out: Path) -> Path:
    """The ends, the fitted curve and the interval at the whole budget."""

    def draw(ax: "Axes") -> None:
        d = np.geomspace(min(t for t, _ in ends) / 1.5, tokens, 100)
        unit, word = page.token_unit(tokens)
        ax.plot(d / unit, [fit.at(x) for x in d], color=page.LIGHT[0], linewidth=1.6)
        ax.plot(
            [t / unit for t, _ in ends],
            [b for _, b in ends],
            "o",
            color=page.LIGHT[1],
            markersize=5,
        )
        ax.errorbar(
            [tokens / unit],
            [fit.bpb],
            [[fit.bpb - fit.lo], [fit.hi - fit.bpb]],
            fmt="o",
            color=page.LIGHT[0],
            capsize=3,
        )
        ax.set_xscale("log")
        ax.set_xlabel(word)
        ax.set_title("Pilot runs and the whole budget, bits per byte")

    return page.write_page(
        "nanochat: pilot", {"Extrapolation": page.gallery([page.svg(partial(draw))])}, out
    )
