"""
The conditions of a comparison, each with its flags of base_train. All flags are checked before
anything runs, and errors name the condition.
"""

import io
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.base.common import UserError, print0
from nanochat.base.knobs import parse
from nanochat.base.runtime import Runtime, choose_device
from nanochat.data import inventory
from nanochat.data.contexts import Contexts
from nanochat.data.sources import default_sources, training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import prior_artifact
from nanochat.model.gpt import GPT
from nanochat.train.horizon import CHARACTERS_PER_TOKEN, choose_horizon, most_passes
from nanochat.train.run import OpenRun, resume_knobs
from nanochat.train.scaling import with_lookback

LETTERS = "abcdefgh"  # the flags of compare that describe a condition
RESERVED = {  # flags of base_train that the comparison sets, and what to use instead
    "seed": "--first_seed and --seeds",
    "model_tag": "--names",
    "resume": "the same compare command again",
    "new_horizon": "another --name",
}


@dataclass(frozen=True)
class Condition:
    """One way of training: its flags of base_train, without those in RESERVED."""

    name: str
    flags: list[str]
    knobs: Any  # of base_train, with these flags
    steps: int | None  # of a run; None if only a time budget ends it
    evaluations: int  # of a run

    @property
    def budget_seconds(self) -> float:
        """The time budget of a run; 0 = none."""
        return 60 * self.knobs.max_minutes + 3600 * self.knobs.max_hours


def conditions_of(knobs: Any, pretrain_knobs: type) -> list[Condition]:
    """
    The conditions that the knobs of compare describe; `pretrain_knobs` are the knobs of base_train.
    Raises UserError for a wrong flag, with the name of the condition.
    """
    texts = {letter: text for letter in LETTERS if (text := getattr(knobs, letter)) is not None}
    if len(texts) < 2:
        raise UserError(
            "compare needs at least two conditions (got 1): add a second one, as in "
            '--b="--activation=silu"'
        )
    conditions = []
    for name, (letter, text) in zip(_names(knobs, texts), texts.items(), strict=True):
        try:
            flags = shlex.split(knobs.common) + shlex.split(text)
            conditions.append(_checked(name, flags, knobs, pretrain_knobs))
        except (
            UserError,
            ValueError,
        ) as e:  # ValueError from shlex: a quotation mark is not closed
            raise UserError(f"condition {name} (--{letter}): {e}") from None
    return conditions


def _names(knobs: Any, texts: dict[str, str]) -> Sequence[str]:
    """The names of the conditions: those of --names, else from their flags, else the letters."""
    names = list(knobs.names)
    if not names:
        for text in texts.values():
            words = re.sub(r"[^\w.]+", "-", text.replace("--", ""))
            names.append(words.strip("-_.")[:40] or "baseline")
        if len(set(names)) < len(names):
            names = list(texts)
    if len(names) != len(texts) or len(set(names)) < len(names):
        raise UserError(
            f"--names gives {len(names)} names ({' '.join(names)}) for {len(texts)} conditions: "
            "give one different name per condition"
        )
    for name in [*names, knobs.name]:
        if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(
                f"{name!r} cannot be a folder name: use letters, digits, dots, dashes and "
                "underscores"
            )
    return names


def _checked(name: str, flags: list[str], knobs: Any, pretrain_knobs: type) -> Condition:
    """A condition whose flags base_train accepts; prints its name, flags and horizon."""
    if {"-h", "--help"} & set(flags):
        raise UserError("--help is not a flag of a condition: run nanochat base_train -h")
    asked, origins = parse(pretrain_knobs, flags, command="base_train")
    for flag, instead in RESERVED.items():
        if origins[flag] != "default":
            raise UserError(f"--{flag} is set by the comparison: use {instead}")
    ours = {
        "eval_every": f"{1 / knobs.points:g}",
        "eval_tokens": knobs.eval_tokens,
        "sample_every": 0,
        "keep": 1,
    }
    if asked.max_minutes or asked.max_hours:
        ours["lookback"] = "off"  # nothing may differ except for the flags that are compared
    flags = flags + [f"--{flag}={v}" for flag, v in ours.items() if origins[flag] == "default"]
    if not asked.data:
        flags += ["--data", *default_sources()]  # the default may change before it is continued
    train, origins = parse(pretrain_knobs, flags, command="base_train")
    resume_knobs("base", name, train, origins)
    print0(f"{name}: {shlex.join(flags)}")
    steps = _steps(train, origins)
    every = train.eval_every
    if every >= 1:
        evaluations = (steps or 0) // int(every)
    else:
        evaluations = round(1 / every) if every else 0
    if evaluations < 2:
        raise UserError(
            f"--eval_every={every:g} leaves no learning curve to compare: lower it, or use --points"
        )
    return Condition(name, flags, train, steps, evaluations)


def _steps(train: Any, origins: dict[str, str]) -> int | None:
    """
    The steps of a run, None if a time budget ends it. Prints the horizon unless it depends on the
    speed of the machine. Checks data, model, prior and horizon as base_train does.
    """
    tokenizer = Tokenizer.load()
    characters = inventory.characters_of(inventory.take(training_sources(train.data)))
    fixed = origins["sequence_len"] != "default"
    contexts = Contexts.parse(train.context_stages, train.sequence_len, fixed)
    train = replace(train, sequence_len=contexts.longest)
    on_cpu = choose_device(train.device_type).type == "cpu"
    train, origins = with_lookback(train, origins, on_cpu, tokenizer.vocab_size)
    config = train.model_config(tokenizer.vocab_size)
    if train.rap:
        prior_artifact.prepare(train, config, tokenizer.fingerprint, torch.device("cpu"))
    runtime = Runtime(torch.device("meta"), torch.float32, 0, 1, 0)
    model = GPT.build(config, "meta")
    unknown_peak = 1e12  # only a run measures it
    run = OpenRun(
        "base", train, origins, runtime, tokenizer, model, Path(), None, unknown_peak, began=0.0
    )
    with redirect_stdout(io.StringIO()) as output:
        horizon = choose_horizon(run, characters)
        steps = horizon.steps
    passes = most_passes(run) * characters / CHARACTERS_PER_TOKEN
    if steps and passes < steps * horizon.rows * contexts.longest:
        steps = max(1, int(passes / (horizon.rows * contexts.longest)))
        print0(f"  it ends after about {steps:,} steps, when it has read its text often enough")
    if steps or train.total_batch_size:  # otherwise the batch depends on the peak
        print0(output.getvalue(), end="")
    return steps
