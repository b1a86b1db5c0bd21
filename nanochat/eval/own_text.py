"""
What a model has learned from a person's own text: answers to held-out questions, bits per byte
beside those of other predictors, and samples with what they copied from the training text.
"""

from collections.abc import Sequence
from typing import Any

from nanochat.chat.generate import Engine
from nanochat.data import inventory
from nanochat.data.feed import eval_documents
from nanochat.data.shards import prepare
from nanochat.data.sources import Source, mixed
from nanochat.eval.baselines import compressors, ngram
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.eval.chat import judge, visible_text
from nanochat.eval.scores import Result, Results, summarise
from nanochat.eval.tasks.common import Task
from nanochat.eval.tasks.text_questions import ABOUT, passages
from nanochat.eval.verbatim import longest_overlap, normalised
from nanochat.model.checkpoint import Loaded

TEMPERATURES = 0.3, 0.7, 1.0
SAMPLE_TOKENS = 80
CHAT: dict[str, Any] = {"temperature": 0.6, "top_k": 50}  # the defaults of chat_cli
PROMPT_WORDS, PROMPT_CHARACTERS = 6, 60
MOST_TOKENS = 1 << 18  # of held-out text that is predicted
# Of training text from which questions are made, that other predictors read, and that is searched
# for what the model copied: more would take minutes and gigabytes
MOST_CHARACTERS = 1 << 25


def share_read(source: Source) -> float:
    """The share of the training text that documents() gives."""
    return min(1.0, MOST_CHARACTERS / max(1, inventory.of(source).kept_characters))


def documents(source: Source, split: str) -> list[str]:
    """
    The documents of a split, "train" or "val"; of a training text with more than MOST_CHARACTERS
    characters, about as many, in documents from all parts of it.
    """
    share = share_read(source) if split == "train" else 1.0
    out, seen, taken = [], 0, 0
    for text in mixed([source], split):
        if taken <= share * seen:
            out.append(text)
            taken += len(text)
        seen += len(text)
    return out


def answers(loaded: Loaded, tasks: Sequence[Task], each: int) -> Result:
    """Ask up to `each` held-out questions of every task; returns scores.summarise() of them."""
    engine = Engine.of(loaded)
    results = {}
    for task in tasks:
        verdicts = judge(engine, task, task.items("val", each))
        results[task.name] = verdicts.result(task.chance)
    return summarise(results)


def bits_per_byte(loaded: Loaded, source: Source) -> float:
    """The model's bits per byte of the held-out text."""
    shards = prepare(source, "val", loaded.tokenizer)
    rows = max(1, 4096 // loaded.model.config.sequence_len)
    token_bytes = loaded.tokenizer.token_bytes()
    return shard_bits_per_byte(loaded.model, shards, token_bytes, loaded.runtime, rows, MOST_TOKENS)


def other_predictors(loaded: Loaded, source: Source) -> dict[str, float]:
    """
    Bits per byte for an n-gram model, xz and gzip, of the held-out text that the model predicts in
    bits_per_byte().
    """
    shards = prepare(source, "val", loaded.tokenizer)
    numbers = sorted(eval_documents(shards, MOST_TOKENS))
    texts = (loaded.tokenizer.decode_bytes(shards.tokens(i)[1:]) for i in numbers)
    train, held_out = "\n\n".join(documents(source, "train")).encode(), b"\n\n".join(texts)
    return {"n-gram": ngram(train, held_out), **compressors(train, held_out)}


def replies(loaded: Loaded, questions: Sequence[str]) -> list[tuple[str, str]]:
    """Each question with its reply, sampled as chat_cli does."""
    tokenizer = loaded.tokenizer
    engine = Engine.of(loaded)
    prompts = [
        tokenizer.render_prompt({"messages": [{"role": "user", "content": question}]})
        for question in questions
    ]
    out = []
    samples = engine.generate_batch(prompts, max_tokens=SAMPLE_TOKENS, **CHAT)
    for question, sample in zip(questions, samples, strict=True):
        text = normalised(visible_text(tokenizer, sample.tokens))
        out.append((question, f"{text} ..." if sample.finish == "length" else text))
    return out


def sample_prompt(texts: Sequence[str]) -> str:
    """The first words of the passage in the middle of the longest text."""
    longest = max(texts, key=len)
    candidates = list(passages(longest)) or [longest]
    words = candidates[len(candidates) // 2].split()
    return " ".join(words[:PROMPT_WORDS])[:PROMPT_CHARACTERS]


def samples(loaded: Loaded, source: Source, seed: int) -> list[dict[str, Any]]:
    """
    Continue the first words of a held-out passage at each of TEMPERATURES. Each sample is
    {temperature, prompt, searched, text} with the fields of its longest Overlap with the share
    `searched` of the training text.
    """
    corpus = " ".join(map(normalised, documents(source, "train")))
    searched = share_read(source)
    prompt = sample_prompt(documents(source, "val"))
    engine = Engine.of(loaded)
    out = []
    for temperature in TEMPERATURES:
        (sample,) = engine.generate_batch(
            [loaded.tokenizer.encode(prompt, bos=True)],
            max_tokens=SAMPLE_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        text = normalised(loaded.tokenizer.decode(sample.tokens))
        about = {"temperature": temperature, "prompt": prompt, "searched": searched, "text": text}
        out.append({**about, **longest_overlap(text, corpus)._asdict()})
    return out


def answer_lines(kinds: Results) -> list[str]:
    """
    The accuracies of kinds of questions as lines to print, the best first: those that are clearly
    better than guessing and at least 50 %, and then the others.
    """
    able, unable = [], []
    for name, result in sorted(kinds.items(), key=lambda kind: -kind[1]["accuracy"]):
        kind = name.partition("/")[2]
        line = f"    {result['accuracy']:4.0%} of {result['n']:<3}  {ABOUT.get(kind, kind)}"
        line += f"  (guessing: {result['chance']:.0%})" if result["chance"] else ""
        is_able = result["lo"] > result["chance"] and result["accuracy"] >= 0.5
        (able if is_able else unable).append(line)
    lines = ["Held-out questions, none of which it has seen:"]
    lines += ["  what it can do", *able] if able else []
    return lines + (["  what it cannot do, or only sometimes", *unable] if unable else [])


def predictor_lines(bits: dict[str, float]) -> list[str]:
    """The bits per byte of all predictors as lines to print, and how the model's compare."""
    shown = ", ".join(f"{name} {value:.2f}" for name, value in bits.items())
    lines = [f"Held-out text, bits per byte (less is better): {shown}"]
    for name, kind in (("xz", "compressor"), ("n-gram", "model of six bytes")):
        factor = bits[name] / bits["model"]
        better = f"better than {name} (a {kind}) by a factor of {factor:.2f}"
        worse = f"no better than {name} (a {kind}): factor {factor:.2f}"
        lines.append(f"    it predicts the text {better if factor > 1 else worse}")
    return lines


def sample_lines(samples: Sequence[dict[str, Any]]) -> list[str]:
    """The results of samples() as lines to print: each text, and what it copied and from where."""
    lines = [f"In the style of the text, going on from {samples[0]['prompt']!r} (held-out text):"]
    for sample in samples:
        lines.append(f"  temperature {sample['temperature']}: {sample['text']}")
        searched = sample["searched"]
        where = f", looked for in {searched:.0%} of the text" if searched < 1 else ""
        lines.append(
            f"    copied: at most {len(sample['overlap'])} characters in a row "
            f"({sample['share']:.0%} of it{where}), from: ... {sample['passage']} ..."
        )
    return lines
