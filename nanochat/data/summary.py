"""
A summary of what a run trains on, as its feed will draw it: a few lines before the first step, and
the same figures for the checkpoint and the log. Obvious mistakes are errors here: nothing to learn,
a source that is never drawn, a validation split that is larger than its training split or too small
to measure anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from nanochat.base.common import UserError, columns, counted, human, in_line, notice
from nanochat.data.order import RowOrder
from nanochat.data.shards import Shards

LEAST_VALIDATION = 100  # tokens of text; with fewer, bits per byte vary by a tenth by chance


@dataclass(frozen=True)
class SourceSummary:
    """One source of a run. Tokens do not count what is cut off at the context."""

    name: str
    kind: str  # "documents" or "conversations"
    documents: int
    tokens: int
    share: float  # of the tokens that the run draws
    passes: float | None  # over this source in the whole run; None if the clock ends it
    steps_per_pass: float
    to_learn: int  # tokens that are predicted
    silent: int  # documents without a token to predict
    longer: int  # documents longer than the context
    longest: int  # tokens of the longest
    validation_documents: int
    validation_tokens: int
    divided: bool  # whether validation was taken out of the same documents
    # Notes of the readers, text -> count; those about text in files are in the inventory
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSummary:
    """What `survey` returns: the sources of a run, and how it draws from them."""

    sources: tuple[SourceSummary, ...]
    context: int  # tokens per row
    padded: bool  # one conversation per row, cut at the context
    step_rows: int
    steps: float | None  # None: the clock ends the run

    def record(self) -> dict[str, Any]:
        """The figures as values of JSON, for the checkpoint and the log."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary in words."""
        lines = [f"this run: {self._length()}", f"to learn: {self._learned()}; {self._cuts()}"]
        notes = [f"{s.name}: {what}: {n:,}" for s in self.sources for what, n in s.notes.items()]
        if notes:
            lines.append(f"notes: {'; '.join(notes)}")
        return [*self._table().splitlines(), *map(in_line, lines)]

    def _table(self) -> str:
        return columns(
            ("data", "to train on", "tokens", "drawn", "passes", "validation"),
            [
                (
                    s.name,
                    counted(s.documents, s.kind),
                    human(s.tokens),
                    f"{s.share:.1%}" if s.share >= 0.001 else f"{s.share:.2g}",
                    f"1 in {counted(max(1.0, s.steps_per_pass), 'steps')}"
                    if s.passes is None
                    else _times(s.passes),
                    f"{counted(s.validation_documents, s.kind)}, "
                    f"{human(s.validation_tokens)} tokens"
                    if s.validation_documents
                    else "none",
                )
                for s in self.sources
            ],
        )

    def _learned(self) -> str:
        learned = sum(s.to_learn for s in self.sources)
        tokens = sum(s.tokens for s in self.sources)
        text = f"{human(learned)} of {human(tokens)} tokens"
        for s in self.sources:
            if s.silent:
                text += f", none in {s.silent:,} of {s.documents:,} {s.kind} of {s.name}"
        return text

    def _length(self) -> str:
        unit = "conversations" if self.padded else f"rows of {self.context:,} tokens"
        rows = f"{self.step_rows:,} {unit}"
        if self.steps is None:
            return f"{rows} per step, until the time is over"
        tokens = f": {human(self.steps * self.step_rows * self.context)} tokens"
        return f"{counted(self.steps, 'steps')} of {rows}{'' if self.padded else tokens}"

    def _cuts(self) -> str:
        longest = max(s.longest for s in self.sources)
        longer = sum(s.longer for s in self.sources)
        text = f"the longest has {longest:,} tokens, the context {self.context:,}: "
        if not longer:
            return text + "nothing is cut"
        done = "lose their end" if self.padded else "continue in another row"
        documents = sum(s.documents for s in self.sources)
        return text + f"{longer:,} of {documents:,} are longer and {done}"

    def check(self, useful: float, steps: float | None = None) -> None:
        """
        Raise UserError for an obvious mistake, and print a notice for a likely one, such as more
        than `useful` passes over a source. `steps`: about how many the run has, if time ends it.
        """
        if not any(s.to_learn for s in self.sources):
            names = ", ".join(s.name for s in self.sources)
            raise UserError(
                f"there is nothing to learn in {names}: not one {self.sources[0].kind[:-1]} has a "
                f"reply within the context of {self.context} tokens; shorten the prompts, use a "
                "model with a longer context, or check which turns are masked"
            )
        for s in self.sources:
            if not s.to_learn:
                notice(
                    f"nothing is learned from {s.name}: none of its {s.documents:,} {s.kind} has a "
                    f"reply within the context of {self.context} tokens"
                )
            if not s.share:
                raise UserError(
                    f"{s.name} would never be drawn, because its weight is too small beside the "
                    "others: give it a larger weight, or leave it out"
                )
            if s.divided:
                _check_validation(s)
            if (s.passes or 1.0) * s.documents < 1:
                notice(
                    f"{s.name} is so rare ({s.share:.2g} of the draws) that this run may not see "
                    f"one of its {s.kind}: give it a larger weight, or train longer"
                )
            passes = s.passes or (steps or 0) / max(s.steps_per_pass, 1e-9)
            if passes > useful:
                more = "add text"
                if s.name == "tinyworld":
                    more = "generate more of it with --data tinyworld@MEGABYTES"
                notice(
                    f"this run goes over {s.name} about {_times(passes)} times; beyond about "
                    f"{useful:g}, a model memorises text instead of learning more: {more}, or "
                    "shorten the run"
                )


def _check_validation(s: SourceSummary) -> None:
    if s.validation_tokens > s.tokens:
        raise UserError(
            f"the validation split of {s.name} has {s.validation_tokens:,} tokens and its training "
            f"split only {s.tokens:,}: add more {s.kind}, or divide the longest into several"
        )
    least = LEAST_VALIDATION if s.kind == "documents" else 1
    if s.validation_documents and s.validation_tokens < least:
        raise UserError(
            f"the validation split of {s.name} has only {s.validation_tokens:,} tokens, too few to "
            f"measure anything (at least {least}): add more {s.kind}"
        )


def _times(passes: float) -> str:
    """A number of passes with three digits."""
    if 0 < passes < 0.005:
        return "< 0.01"
    return f"{passes:.2f}" if passes < 9.995 else f"{passes:,.0f}"


def survey(
    order: RowOrder, validation: Sequence[Shards], step_rows: int, steps: int | None = None
) -> DataSummary:
    """
    The summary of a run that takes `step_rows` rows of `order` per step, for `steps` steps; if
    None, for order.epochs, or until time ends it. `validation` has the validation splits of the
    first sources, in the same order. Raises UserError if one of them has nothing to predict.
    """
    padded = order.mode == "padded"
    width = order.sequence_len + 1
    epochs = order.epochs
    rows_per_epoch = order.rows_per_epoch()
    if steps:
        epochs = steps * step_rows / rows_per_epoch
    elif epochs:
        steps = max(1, -(-round(rows_per_epoch * epochs) // step_rows))
    kept = [int(np.minimum(s.lengths, width).sum()) if padded else s.total for s in order.shards]
    drawn = [q * k / s.total for q, k, s in zip(order.quota, kept, order.shards, strict=True)]
    sources = []
    for i, (shards, val) in enumerate(zip_longest(order.shards, validation)):
        learned = shards.to_predict(width if padded else None)
        conversations = shards.masked
        per_epoch = order.quota[i] / shards.total  # passes over this source in an epoch
        name = shards.name.removesuffix("-conversations-train")
        if val and conversations and shards.divided and not val.to_predict().any():
            raise UserError(
                f"the validation split of {name} has no reply to predict: add more conversations"
            )
        sources.append(
            SourceSummary(
                name=name,
                kind="conversations" if conversations else "documents",
                documents=len(shards),
                tokens=kept[i],
                share=drawn[i] / sum(drawn),
                passes=epochs * per_epoch if epochs else None,
                steps_per_pass=rows_per_epoch / step_rows / per_epoch if per_epoch else 0.0,
                to_learn=int(learned.sum()),
                silent=int((learned == 0).sum()),
                longer=int((shards.lengths > width).sum()),
                longest=int(shards.lengths.max()),
                validation_documents=len(val) if val else 0,
                validation_tokens=val.total if val else 0,
                divided=shards.divided,
                notes={} if shards.divided and not conversations else dict(shards.notes),
            )
        )
    return DataSummary(tuple(sources), order.sequence_len, padded, step_rows, steps)
