"""
Turns the rows of a CORE task into token sequences that share as much as possible.

Few-shot examples: a task has PROMPTS prompts, which are lists of examples drawn by the seed, and
row i continues prompt i % PROMPTS. In the prompt of a row that would be its own example, the next
one drawn takes its place. So nearly all rows share a few beginnings, which are computed once. If
examples are drawn for every row (as for the published GPT-2 figures), rows share nothing; the
expected score is the same, and its variance slightly lower.

If a row is too long for the context, it gets fewer examples, the first ones of its prompt. If the
question alone is too long, it loses tokens from the left, after <|bos|>; the scored tokens all
stay. Only if these alone are longer than the context do they lose their beginning. The items say
which of the three happened.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from nanochat.data.tokenizer import Tokenizer, in_common
from nanochat.eval.core_bundle import CoreTask

PROMPTS = 4  # per task with few-shot examples


class CoreItem(NamedTuple):
    """
    A row as the model sees it. Sequence j is the first `past` tokens of the prompt with number
    `prompt`, followed by ids[j].
    """

    row: int
    prompt: int
    past: int
    ids: list[list[int]]
    shared: int  # leading tokens that all of ids have in common, at least 1
    starts: list[int]  # the scored tokens of ids[j] are those from starts[j] on
    gold: int
    shots: int  # few-shot examples it has
    cropped: bool  # its question lost tokens
    overlong: bool  # its scored tokens lost their beginning

    @property
    def slots(self) -> int:
        """
        How many tokens are computed: the shared ones once, and the rest of each sequence except its
        last token, which predicts nothing.
        """
        return self.shared + sum(len(ids) - 1 - self.shared for ids in self.ids)


class _Example(NamedTuple):
    row: int
    tokens: list[int]


class _Sequences(NamedTuple):
    """The sequences of a row without examples and <|bos|>; `shared` and `starts` as in CoreItem."""

    ids: list[list[int]]
    shared: int
    starts: list[int]

    def crop(self, context: int) -> tuple["_Sequences", list[int]]:
        """
        The last `context` tokens of each sequence, or all, and how many each has lost. Where it can
        be done, all lose the same number of shared tokens, so that they still share the others.
        """
        longest = max(map(len, self.ids))
        together = min(max(0, longest - context), self.shared)
        cuts = [max(together, len(ids) - context) for ids in self.ids]
        cropped = _Sequences(
            ids=[ids[cut:] for ids, cut in zip(self.ids, cuts, strict=True)],
            shared=max(0, self.shared - cuts[0]) if len(set(cuts)) == 1 else 0,
            starts=[max(0, start - cut) for start, cut in zip(self.starts, cuts, strict=True)],
        )
        return cropped, cuts


def prepare(
    task: CoreTask, tokenizer: Tokenizer, context: int, seed: int = 42, max_items: int = 0
) -> tuple[list[CoreItem], list[list[int]]]:
    """
    The items of a task for a context of so many tokens, and the prompts (token ids from <|bos|> on)
    that they share. Takes all rows, or `max_items` of them drawn by the seed. Examples are encoded
    separately from the question.
    """
    n = len(task.rows)
    chosen = list(range(n))
    if 0 < max_items < n:
        chosen = sorted(Random(f"{seed}/{task.name}/items").sample(chosen, max_items))
    prompts = []
    for number in range(PROMPTS if task.shots else 1):
        rows = Random(f"{seed}/{task.name}/{number}").sample(range(n), min(n, task.shots + 1))
        prompts.append([_example(task, row, tokenizer) for row in rows])
    items = []
    for row in chosen:
        number = row % len(prompts)
        whole = _encode(task, task.rows[row], tokenizer)
        sequences, cuts = whole.crop(context)
        shown = [example for example in prompts[number] if example.row != row][: task.shots]
        # <|bos|> needs no room, because the last token of a sequence is never computed.
        room = context - max(map(len, whole.ids))
        while shown and sum(len(example.tokens) for example in shown) > room:
            shown.pop()
        in_prompt = in_common([shown, prompts[number]])
        head = _joined(tokenizer.bos, shown[:in_prompt])
        # The last token of the prompt is computed again, because it predicts the next one.
        rest = _joined(head[-1], shown[in_prompt:])
        items.append(
            CoreItem(
                row=row,
                prompt=number,
                past=len(head) - 1,
                ids=[rest + ids for ids in sequences.ids],
                shared=len(rest) + sequences.shared,
                starts=[len(rest) + start for start in sequences.starts],
                gold=task.rows[row].get("gold", 0),
                shots=len(shown),
                cropped=max(cuts) > 0,
                overlong=any(cut > start for cut, start in zip(cuts, whole.starts, strict=True)),
            )
        )
    return items, [_joined(tokenizer.bos, prompt) for prompt in prompts]


def separate_sequences(
    items: Sequence[CoreItem], prompts: Sequence[Sequence[int]]
) -> list[CoreItem]:
    """
    The items' sequences in order, each as an item that continues no prompt and has all its tokens
    in the trunk, so that no sequence shares anything with another.
    """
    return [
        item._replace(
            prompt=0,
            past=0,
            ids=[[*prompts[item.prompt][: item.past], *ids]],
            shared=item.past + len(ids) - 1,
            starts=[item.past + start],
        )
        for item in items
        for ids, start in zip(item.ids, item.starts, strict=True)
    ]


def _example(task: CoreTask, row: int, tokenizer: Tokenizer) -> _Example:
    """A row with its right answer, as an example."""
    fields = task.rows[row]
    answer = task.texts(fields)[fields.get("gold", 0)]
    return _Example(row, tokenizer.encode(answer + "\n\n"))


def _joined(first: int, examples: Sequence[_Example]) -> list[int]:
    return [first, *(token for example in examples for token in example.tokens)]


def _encode(task: CoreTask, row: dict[str, Any], tokenizer: Tokenizer) -> _Sequences:
    ids = [tokenizer.encode(text) for text in task.texts(row)]
    if task.kind == "schema":  # the common end is scored
        tail = max(1, in_common([sequence[::-1] for sequence in ids]))
        starts = [len(sequence) - tail for sequence in ids]
        return _Sequences(ids, min(in_common(ids), *starts), starts)
    if task.kind == "multiple_choice":
        shared = in_common(ids)
    else:
        # A space between question and answer belongs to the first token of the answer.
        question = (row["context"].strip() + task.delimiter).strip()
        shared = in_common([ids[0], tokenizer.encode(question)])
    # If an answer is the beginning of another one, its last token is scored all the same.
    shared = min(shared, min(map(len, ids)) - 1)
    return _Sequences(ids, shared, [shared] * len(ids))
