"""
The CORE score: the mean centred accuracy of a base model over the tasks of an evaluation bundle (DCLM, arXiv 2406.11794).

A bundle is a folder with core.yaml (the tasks), eval_meta_data.csv (what guessing scores, in percent) and eval_data/ (jsonl). Three kinds:
multiple_choice compares continuations of one question by their mean negative log-likelihood a token after their common beginning; schema
compares beginnings of one continuation by that of their common end; language_modeling asks whether greedy decoding says the continuation.

Few-shot examples: a task draws PROMPTS lists of them, fixed by the seed, and row i continues list i % PROMPTS; a row that is itself in its
list is left out and the next one drawn takes its place. So nearly all rows share a few beginnings, which are computed once, where a draw
for every row (as for the published GPT-2 figures) shares none: the same expected score, with a little more chance in it from the draw.

What is too long for the context: a row takes fewer examples, the first of its list, as many as fit with its longest sequence; a question
that is too long without any loses tokens from the left, after <|bos|>; what is scored stays whole. Only where that alone is longer than the
context does it lose its beginning. All three are counted. A tie is decided by lot, so that no position of the right answer gains by it.

A score that lacks tasks is never called CORE. Data that are malformed stop the evaluation with their file and line.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from nanochat.base.common import UserError, notice
from nanochat.base.runtime import Runtime, out_of_memory, release_memory
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.chat import accuracy
from nanochat.eval.tasks.data import read
from nanochat.model.attention import Bias
from nanochat.model.cache import KVCache
from nanochat.model.gpt import GPT
from nanochat.model.loss import capped, chunk_rows

PROMPTS = 4  # lists of few-shot examples a task
PASS_BYTES = {"cpu": 2**25, "cuda": 2**31}  # on a CPU a pass should stay near the caches
TIE = 1e-5  # nats a token: below it float32 cannot tell two answers apart
FIELDS = {  # of a row, by kind: those that are text, and the one that is a list of texts
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), ""),
}

# ----------------------------------------------------------------------------------------------------
# The bundle


@dataclass(frozen=True)
class CoreTask:
    name: str
    kind: str  # one of FIELDS
    shots: int  # examples before the question
    delimiter: str  # between a question and its answer
    chance: float  # what guessing scores, says the bundle
    rows: list[dict[str, Any]]

    def texts(self, row: dict[str, Any]) -> list[str]:
        """Every sequence that is compared, without examples; of language modelling the only one."""
        if self.kind == "multiple_choice":
            return [row["query"] + self.delimiter + choice for choice in row["choices"]]
        begins = row["context_options"] if self.kind == "schema" else [row["context"].strip()]
        return [begin + self.delimiter + row["continuation"] for begin in begins]


def load_bundle(directory: Path | str) -> tuple[list[CoreTask], list[str]]:
    """The tasks of a bundle, and the names of those whose data are not there. UserError names the place of what is missing or malformed."""
    root = Path(directory)
    listed, figures = root / "core.yaml", root / "eval_meta_data.csv"
    for path in (listed, figures, root / "eval_data"):
        if not path.exists():
            raise UserError(
                f"there is no {path}: an evaluation bundle has core.yaml, eval_meta_data.csv and eval_data/"
            )
    chance = _chances(figures)
    try:
        entries = yaml.safe_load(listed.read_text(encoding="utf-8"))["icl_tasks"]
        needed = ("label", "dataset_uri", "num_fewshot", "icl_task_type")
        plans = [
            (*(e[name] for name in needed), e.get("continuation_delimiter", " ")) for e in entries
        ]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{listed} is no list icl_tasks of label, dataset_uri, num_fewshot, icl_task_type ({type(e).__name__}: {e})"
        ) from e
    tasks, absent = [], []
    for name, uri, shots, kind, delimiter in plans:
        shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
        if (
            kind not in FIELDS
            or type(shots) is not int
            or shots < 0
            or not isinstance(delimiter, str)
        ):
            given = f"icl_task_type {kind!r}, num_fewshot {shots!r}, continuation_delimiter {delimiter!r}"
            raise UserError(
                f"{listed}: the task {name} has {given}: choose from {', '.join(FIELDS)}; 0 or more; a text"
            )
        if name not in chance:
            raise UserError(f"{figures} has no row for the task {name}: add its random baseline")
        path = root / "eval_data" / str(uri)
        if path.is_file():
            tasks.append(CoreTask(name, kind, shots, delimiter, chance[name], _rows(path, kind)))
        else:
            absent.append(name)
    if not tasks or len({t.name for t in tasks} | {*absent}) < len(plans):
        raise UserError(
            f"{listed} has {len(plans)} tasks, the data of {len(tasks)} are there: it needs one, and names that differ"
        )
    return tasks, absent


def _chances(path: Path) -> dict[str, float]:
    out = {}
    with open(path, encoding="utf-8", newline="") as f:
        for row in (reader := csv.DictReader(f)):
            try:
                out[row["Eval Task"]] = value = float(row["Random baseline"]) / 100
            except (KeyError, TypeError, ValueError) as e:
                raise UserError(
                    f"{path}, line {reader.line_num}: no Eval Task with a Random baseline in percent"
                ) from e
            if not 0 <= value < 1:
                raise UserError(
                    f"{path}, line {reader.line_num}: a random baseline of {value:.0%}: it must be below 100 %"
                )
    return out


def _rows(path: Path, kind: str) -> list[dict[str, Any]]:
    texts, options = FIELDS[kind]
    rows = []
    for place, row in read(path):
        several = row.get(options) if options else []
        if (
            not isinstance(several, list)
            or (options and len(several) < 2)
            or not all(isinstance(x, str) for x in several)
        ):
            raise UserError(
                f"{place}: {options} must be a list of two or more texts; mend or delete the line"
            )
        if wrong := [name for name in texts if not isinstance(row.get(name), str)]:
            raise UserError(f"{place}: {wrong[0]} must be a text; mend or delete the line")
        if not all(
            text.strip()
            for text in (several if kind == "multiple_choice" else [row["continuation"]])
        ):
            raise UserError(f"{place}: an answer is empty; mend or delete the line")
        if options and (type(row.get("gold")) is not int or not 0 <= row["gold"] < len(several)):
            raise UserError(
                f"{place}: gold is {row.get('gold')!r}, not a number from 0 to {len(several) - 1}; mend or delete the line"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: fetch or make it again")
    return rows


# ----------------------------------------------------------------------------------------------------
# From rows to tokens


class CoreItem(NamedTuple):
    """A row as the model sees it: sequence j is the first `past` tokens of its task's prompt number `prompt`, then ids[j]."""

    row: int
    prompt: int
    past: int
    ids: list[list[int]]
    shared: int  # leading tokens that all of ids share, at least 1
    starts: list[int]  # where in ids[j] the tokens begin that are scored: those from there on
    gold: int
    shots: int  # examples that it has
    cropped: bool  # its question lost tokens
    overlong: bool  # what is scored lost tokens

    @property
    def slots(self) -> int:
        """Tokens to compute: the shared ones once, and of each sequence the rest but its last token, which predicts nothing."""
        return self.shared + sum(max(0, len(s) - 1 - self.shared) for s in self.ids)


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading elements all sequences share."""
    shortest = min(sequences, key=len)
    return next(
        (i for i, x in enumerate(shortest) if any(s[i] != x for s in sequences)), len(shortest)
    )


def _spans(
    task: CoreTask, row: dict[str, Any], tok: Tokenizer
) -> tuple[list[list[int]], int, list[int]]:
    """The tokens of the row's sequences, how many they share at the left, and where each one's scored span begins."""
    seqs = [tok.encode(text) for text in task.texts(row)]
    if task.kind == "schema":
        tail = max(1, _common([s[::-1] for s in seqs]))
        starts = [len(s) - tail for s in seqs]
        return seqs, min(_common(seqs), *starts), starts
    if task.kind == "multiple_choice":
        shared = _common(seqs)
    else:  # where the question alone, without the space that belongs to the answer's first token, would end
        shared = _common([seqs[0], tok.encode((row["context"].strip() + task.delimiter).strip())])
    shared = min(
        shared, min(map(len, seqs)) - 1
    )  # an answer that begins another one is scored on its last token at least
    return seqs, shared, [shared] * len(seqs)


def prepare(
    task: CoreTask, tok: Tokenizer, context: int, seed: int = 42, max_items: int = 0
) -> tuple[list[CoreItem], list[list[int]]]:
    """
    The task's items (all rows, or max_items of them drawn by the seed) for a context of so many tokens, and the prompts that they share.
    Examples are encoded apart from the question; every sequence begins with <|bos|>.
    """
    n = len(task.rows)
    chosen = range(n)
    if 0 < max_items < n:
        chosen = sorted(Random(f"{seed}/{task.name}/items").sample(chosen, max_items))
    draws = [
        Random(f"{seed}/{task.name}/{p}").sample(range(n), min(n, task.shots + 1))
        for p in range(PROMPTS if task.shots else 1)
    ]
    solved = {
        e: tok.encode(task.texts(task.rows[e])[task.rows[e].get("gold", 0)] + "\n\n")
        for draw in draws
        for e in draw
    }
    items = []
    for r in chosen:
        p = r % len(draws)
        seqs, shared, starts = _spans(task, task.rows[r], tok)
        room = context - max(
            map(len, seqs)
        )  # for the examples: <|bos|> is one more, and the last token need not be fed
        examples = [e for e in draws[p] if e != r][: task.shots]
        while examples and sum(len(solved[e]) for e in examples) > room:
            examples.pop()
        together = min(max(0, -room), shared)
        cuts = [max(together, len(s) - context) for s in seqs]
        shared = max(0, shared - cuts[0]) if len(set(cuts)) == 1 else 0
        known = _common([examples, draws[p]])
        head = [tok.bos, *(t for e in examples[:known] for t in solved[e])]
        rest = [
            head[-1],
            *(t for e in examples[known:] for t in solved[e]),
        ]  # the last known token is fed again: it predicts the next
        items.append(
            CoreItem(
                row=r,
                prompt=p,
                past=len(head) - 1,
                ids=[rest + s[c:] for s, c in zip(seqs, cuts, strict=True)],
                shared=len(rest) + shared,
                starts=[len(rest) + max(0, s - c) for s, c in zip(starts, cuts, strict=True)],
                gold=task.rows[r].get("gold", 0),
                shots=len(examples),
                cropped=max(cuts) > 0,
                overlong=any(c > s for s, c in zip(starts, cuts, strict=True)),
            )
        )
    return items, [[tok.bos, *(t for e in draw for t in solved[e])] for draw in draws]


# ----------------------------------------------------------------------------------------------------
# Scoring


class Score(NamedTuple):
    nats: float  # mean negative log-likelihood of the scored tokens
    tokens: int  # how many they are
    greedy: bool  # whether each was the likeliest one


class _Branches(KVCache):
    """
    Attention for one pass over rows that continue the first tokens of one cached sequence, each by a trunk and the branches that
    part from it. A branch sees itself, the trunk and its row's part of the cache; nothing is copied for a row or for a branch.
    It knows no attention prior, whose rules look at the token before a key: in a branch that is another one than the slot before holds.
    """

    def __init__(self, k: Tensor, v: Tensor, past: list[int], positions: Tensor, branch: Tensor):
        """k, v (layer, H_kv, cached, D); past (B): how many of these a row sees; positions, branch (B, T) of every token, 0 the trunk."""
        self.k, self.v, self.past, self.at = k, v, past, positions
        there, here = branch[:, None, :], branch[:, :, None]
        self.hidden = torch.ones_like(here == there).triu(1) | (
            (there != here) & (there != 0)
        )  # (B, T, T)

    def positions(self, T: int) -> Tensor:
        return self.at

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        window: int = 0,
        bias: Bias | None = None,
    ) -> Tensor:
        """q (B, H, T, D); k, v (B, H_kv, T, D) -> (B, H, T, D)."""
        (B, H, T, D), given = q.shape, q.dtype
        kv, most, dtype = k.size(1), max(self.past), self.k.dtype
        q, k, v = (
            (q * D**-0.5).to(dtype).reshape(B, kv, -1, D),
            k.to(dtype),
            v.to(dtype),
        )  # the heads of a group become queries of one head

        def weigh(
            scores: Tensor,
        ) -> Tensor:  # queries and keys are normalised: no score is above sqrt(D), so no maximum is looked for
            return scores.float().sub_(D**0.5).exp_()

        i, j = positions[:, :, None], positions[:, None, :]
        hidden = self.hidden | (i - j >= window) if window > 0 else self.hidden
        p = weigh(q @ k.mT)
        p.view(B, kv, -1, T, T).masked_fill_(hidden[:, None, None], 0)
        total, y = p.sum(-1, keepdim=True), (p.to(dtype) @ v).float()
        if most:  # the queries of all rows against the one copy of the cached keys
            p = weigh(q.transpose(0, 1).reshape(kv, -1, D) @ self.k[layer, :, :most].mT)
            if window > 0 or min(self.past) < most:
                slot = torch.arange(most, device=q.device)
                unseen = (
                    slot >= torch.tensor(self.past, device=q.device)[:, None, None]
                )  # (B, 1, past), or with a window (B, T, past)
                p.view(kv, B, -1, T, most).masked_fill_(
                    (unseen | (i - slot >= window) if window > 0 else unseen)[:, None], 0
                )
            total += p.sum(-1).view(kv, B, -1, 1).transpose(0, 1)
            y += (p.to(dtype) @ self.v[layer, :, :most]).float().view(kv, B, -1, D).transpose(0, 1)
        return (y / total).to(given).view(B, H, T, D)


class Scorer:
    """Scores items with a model in passes that take about `memory` bytes (0: what suits the device); halves that when memory runs out."""

    def __init__(self, model: GPT, memory: float = 0):
        self.model, self.memory = (
            model,
            memory or PASS_BYTES.get(model.embed.weight.device.type, 2**28),
        )

    @torch.inference_mode()
    def __call__(
        self,
        items: Sequence[CoreItem],
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Score]]:
        """The scores of every item's sequences. Items of like length share a pass; the longest come first. progress: items done."""
        scores: dict[int, list[Score]] = {}
        for number, prompt in enumerate(prompts):
            mine = sorted(
                (i for i, item in enumerate(items) if item.prompt == number),
                key=lambda i: items[i].slots,
                reverse=True,
            )
            if not mine:
                continue
            past = max(items[i].past for i in mine)
            known = self._known(prompt[:past]) if self.model.prior is None else None
            at = 0
            while at < len(mine):
                longest = items[mine[at]]
                cost = (
                    self._bytes(longest.slots, past)
                    if known
                    else len(longest.ids) * self._bytes(past + max(map(len, longest.ids)), 0)
                )
                chunk = mine[at : at + max(1, int(self.memory / cost))]
                try:
                    scores.update(
                        zip(
                            chunk, self._pass(known, prompt, [items[i] for i in chunk]), strict=True
                        )
                    )
                except RuntimeError as e:
                    if not out_of_memory(e) or len(chunk) == 1:
                        raise
                    self.memory = cost * (len(chunk) // 2)
                    release_memory()
                    notice(f"out of memory: going on with {len(chunk) // 2} items at a time")
                    continue
                at += len(chunk)
                progress(len(scores))
        return [scores[i] for i in range(len(items))]

    def _bytes(self, slots: int, past: int) -> float:
        """What a row takes: its activations and the attention of one layer."""
        c = self.model.config
        return 4.0 * slots * (3 * c.n_head * (slots + past) + 12 * c.n_embd + 2 * c.hidden)

    def _known(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt's beginning, (layer, H_kv, tokens, D) each."""
        cache = self.model.new_cache(1, max(1, len(tokens)))
        if tokens:
            self.model(torch.tensor([tokens], device=cache.k.device), cache)
        dtype = (
            torch.float32 if self.model.compute_dtype == torch.float16 else self.model.compute_dtype
        )  # float16 is too narrow for exp
        return cache.k[:, 0].to(dtype), cache.v[:, 0].to(dtype)

    def _pass(
        self, known: tuple[Tensor, Tensor] | None, prompt: Sequence[int], items: list[CoreItem]
    ) -> list[list[Score]]:
        """One pass over the items, `known` being what _known says of their prompt's beginning."""
        hidden, ends = self._together(*known, items) if known else self._apart(prompt, items)
        b, slot, target = torch.tensor(ends, device=hidden.device).T
        nats, greedy = self._read(hidden[b, slot], target)
        out, done = [], 0
        for item in items:
            out.append([])
            for s, start in zip(item.ids, item.starts, strict=True):
                span = slice(done, done := done + len(s) - start)
                out[-1].append(
                    Score(sum(nats[span]) / (len(s) - start), len(s) - start, all(greedy[span]))
                )
        return out

    def _together(
        self, k: Tensor, v: Tensor, items: list[CoreItem]
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """
        A row for each item: its trunk, then a branch for every sequence. k, v: of the prompt's beginning. Returns the hidden states
        (B, T, n_embd) and (row, slot, target) of every scored token, in order.
        """
        T = max(item.slots for item in items)
        ids, places, branches, ends = [], [], [], []
        for b, item in enumerate(items):
            row, place, branch = (
                item.ids[0][: item.shared],
                [*range(item.shared)],
                [0] * item.shared,
            )
            for j, s in enumerate(item.ids):
                first = len(row) - item.shared  # token t of the branch stands in slot first + t
                ends += [
                    (b, t - 1 if t <= item.shared else first + t - 1, s[t])
                    for t in range(item.starts[j], len(s))
                ]
                row = row + s[item.shared : -1]
                place += range(item.shared, len(s) - 1)
                branch += [j + 1] * (len(row) - len(branch))
            padding = T - len(row)
            ids.append(row + [0] * padding)
            places.append([item.past + x for x in place] + [0] * padding)
            branches.append(branch + [-1] * padding)
        at, positions, branch = torch.tensor([ids, places, branches], device=k.device)
        return self.model(
            at, _Branches(k, v, [item.past for item in items], positions, branch)
        ), ends

    def _apart(
        self, prompt: Sequence[int], items: list[CoreItem]
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """The same with a row for each sequence, nothing shared: several times slower, and the only way with an attention prior."""
        rows = [
            (item, start, [*prompt[: item.past], *s])
            for item in items
            for s, start in zip(item.ids, item.starts, strict=True)
        ]
        T = max(len(s) for *_, s in rows) - 1
        at = torch.tensor(
            [s[:-1] + [0] * (T - len(s) + 1) for *_, s in rows],
            device=self.model.embed.weight.device,
        )
        ends = [
            (b, t - 1, s[t])
            for b, (item, start, s) in enumerate(rows)
            for t in range(item.past + start, len(s))
        ]
        return self.model(at), ends

    def _read(self, hidden: Tensor, target: Tensor) -> tuple[list[float], list[bool]]:
        """Hidden states (R, D) and the tokens that follow (R,) -> their negative log-likelihoods, and whether they are the likeliest."""
        nats, greedy = [], []
        for h, t in zip(
            *(x.split(chunk_rows(hidden, self.model.head_weight)) for x in (hidden, target)),
            strict=True,
        ):
            logits = self.model.logits(h)
            # in bfloat16 the logits of two letters are often equal: those of the targets are computed again in float32
            exact = capped(
                (h.float() * self.model.head_weight[t].float()).sum(-1), self.model.config.softcap
            )
            nats += (logits.logsumexp(-1) - exact).tolist()
            greedy += (logits.argmax(-1) == t).tolist()
        return nats, greedy


# ----------------------------------------------------------------------------------------------------
# From scores to the score


def choose(scores: Sequence[Score], lot: Random) -> int:
    """The sequence with the lowest mean; among those that are equally low, one by lot."""
    best = min(s.nats for s in scores)
    if not math.isfinite(best):
        raise UserError("the model's losses are not finite: it cannot be evaluated")
    return lot.choice([j for j, s in enumerate(scores) if s.nats - best <= TIE])


def evaluate(
    scorer: Scorer,
    task: CoreTask,
    tok: Tokenizer,
    rt: Runtime,
    max_items: int = 0,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> dict[str, Any]:
    """
    A task's row of the result: kind, accuracy, n, chance, lo, hi (95 % interval), centred; guess (what uniform guessing scores); shots
    and had (examples asked for, and mean); fewer, cropped, overlong (items with fewer examples, that lost tokens, and of what is scored).
    Items are shared among the ranks. progress gets the items of this rank that are done, and how many there are.
    """
    items, prompts = prepare(task, tok, scorer.model.config.sequence_len, rt.seed, max_items)
    mine = items[rt.rank :: rt.world_size]
    right = []
    for item, scores in zip(
        mine, scorer(mine, prompts, lambda done: progress(done, len(mine))), strict=True
    ):
        choice = choose(scores, Random(f"{rt.seed}/{task.name}/{item.row}/lot"))
        right.append(scores[0].greedy if task.kind == "language_modeling" else choice == item.gold)
    if rt.world_size > 1:
        parts: list[Any] = [None] * rt.world_size
        dist.all_gather_object(parts, right)
        right = [x for part in parts for x in part]
    found = accuracy(right, task.chance)
    return {
        "kind": task.kind,
        **found,
        "centred": _centred(found["accuracy"], task.chance),
        "guess": 0.0
        if task.kind == "language_modeling"
        else sum(1 / len(i.ids) for i in items) / len(items),
        "shots": task.shots,
        "had": sum(i.shots for i in items) / len(items),
        "fewer": sum(i.shots < task.shots for i in items),
        "cropped": sum(i.cropped for i in items),
        "overlong": sum(i.overlong for i in items),
    }


def _centred(share: float, chance: float) -> float:
    """0 for guessing, 1 for all right."""
    return (share - chance) / (1 - chance)


def summarise(results: dict[str, dict[str, Any]], absent: Sequence[str] = ()) -> dict[str, Any]:
    """
    The mean centred accuracy with its 95 % margin, what guessing would give, and its name, which is CORE only when no task is absent.
    The margin is that of drawing the items: random models are further apart, since one that always says "no" or "C" is right more or
    less often than chance on every item of a task at once.
    """
    n, of = len(results), len(results) + len(absent)
    halves = [(r["hi"] - r["lo"]) / 2 / (1 - r["chance"]) for r in results.values()]
    return {
        "name": "CORE" if not absent else f"mean centred accuracy of {n} of {of} tasks",
        "score": sum(r["centred"] for r in results.values()) / n,
        "margin": math.sqrt(sum(h * h for h in halves)) / n,
        "guess": sum(_centred(r["guess"], r["chance"]) for r in results.values()) / n,
        "tasks": results,
        "present": n,
        "of": of,
        "absent": list(absent),
    }
