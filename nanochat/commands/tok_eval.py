"""
How well the tokenizer compresses: characters and bytes a token, by data source (validation text) and by a few kinds of text that stand
here, beside the GPT-2 and GPT-4 vocabularies where they can be had. The last line of the output is JSON.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanochat.base import knobs
from nanochat.base.common import UserError, entry, notice, print0
from nanochat.base.knobs import knob
from nanochat.data.sources import documents, training_sources
from nanochat.data.tokenizer import Tokenizer, segments

OTHERS = {"gpt2": "gpt2", "gpt4": "cl100k_base"}  # as the table calls them -> as tiktoken does

KINDS = {
    "english": (
        "The ferry leaves the island at a quarter past six, and whoever misses it stays until morning. Marta knew this as well as anybody; "
        "still, she stopped at the bakery, because the smell of warm bread had come all the way down to the harbour to fetch her. \"You'll "
        'never make it," said the baker, counting out her change. "I don\'t think the captain would leave without his breakfast," she '
        "replied, and took a second loaf. Scientists have measured how long people are willing to wait for something they want. The answer "
        "depends less on patience than on whether a clock is in sight: take it off the wall, and most of us stay twice as long."
    ),
    "code": (
        'def running_mean(values: list[float], width: int = 3) -> list[float]:\n    """Mean of the last `width` values at each place."""\n'
        "    total, means = 0.0, []\n    for i, value in enumerate(values):\n        total += value\n        if i >= width:\n"
        "            total -= values[i - width]\n        means.append(total / min(i + 1, width))\n    return means\n\n\n"
        'if __name__ == "__main__":\n    print(running_mean([1, 2, 4, 8.5], width=2))\n\n'
        "for (size_t i = 0; i < rows; ++i) {\n    if (!table[i].empty()) { sum += table[i].front()->weight; }\n}\n"
        "SELECT name, COUNT(*) AS n FROM visits WHERE year >= 2019 GROUP BY name ORDER BY n DESC;\n"
    ),
    "maths": (
        "A train covers 318 km in 2.5 h, so its mean speed is 318 / 2.5 = 127.2 km/h. For what n does 3n + 7 = 100 hold? n = 31.\n"
        "Let $f(x) = x^3 - 6x^2 + 11x - 6$. Since $f(1) = f(2) = f(3) = 0$, we have $f(x) = (x - 1)(x - 2)(x - 3)$ and "
        "$\\int_0^1 f(x)\\,dx = \\frac{1}{4} - 2 + \\frac{11}{2} - 6 = -\\frac{9}{4}$.\n"
        "17 x 23 = 391; 1,048,576 = 2^20; 45 % of 2,340 is 1,053; pi begins 3.14159265358979. If a < b and c >= 0 then ac <= bc.\n"
    ),
    "other languages": (
        "Der Zug fährt um halb sieben ab, und wer ihn verpasst, muss über Nacht bleiben. La boulangère m'a rendu la monnaie sans lever "
        "les yeux. ¿Quién dejó la ventana abierta? Утром на озере было тихо, только скрипели вёсла. Η θάλασσα ήταν ήρεμη. "
        "كان الطريق طويلا والليل هادئا."
    ),
    "cjk": (
        "早上六点一刻，渡船离开小岛，没赶上的人只好等到第二天。她还是在面包店停了下来。「間に合わないよ」とパン屋は言った。"
        "それでも彼女はもう一つ買った。시계를 벽에서 떼어 내면 사람들은 두 배나 오래 기다린다고 한다."
    ),
    "emoji": "Good morning ☀️🥐! On the boat ⛴️ now, wind 💨💨 but happy 😄🙌🏽 — call you tonight 📞❤️ 👩‍🚀👨‍👩‍👧 🇫🇮🇯🇵 ✅ 3️⃣",
}


@dataclass(kw_only=True)
class Knobs:
    """Tokenizer evaluation"""

    data: tuple[str, ...] = knob(
        (), "sources to measure on, as for base_train (default: downloaded shards, else tinyworld)"
    )
    max_chars: int = knob(2_000_000, "characters of validation text a source, at most", low=1)
    wait: float = knob(
        20.0,
        "seconds to wait for the GPT-2 and GPT-4 vocabularies, fetched from the internet; 0 = do without",
        low=0.0,
    )


def other_encodings(seconds: float) -> dict[str, Callable[[str], list[int]]]:
    """The published vocabularies that could be had in time. tiktoken waits for a network without bound, hence the thread."""
    found: dict[str, Callable[[str], list[int]]] = {}
    trouble = f"no answer in {seconds:g} s"

    def fetch() -> None:
        nonlocal trouble
        import tiktoken

        try:
            for name, published in OTHERS.items():
                found[name] = tiktoken.get_encoding(published).encode_ordinary
        except Exception as e:  # whatever the network, a proxy or a damaged cache may raise: the comparison is a bonus
            trouble = type(e).__name__

    if seconds > 0:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(seconds)
        had = dict(found)
        if missing := [name for name in OTHERS if name not in had]:
            notice(
                f"no comparison with the vocabularies of {' and '.join(missing)}: they come from the internet ({trouble})"
            )
        return had
    return {}


def capped(texts: Iterable[str], max_chars: int) -> list[str]:
    """The first texts, max_chars characters in all."""
    taken = []
    for text in texts:
        taken.append(text[:max_chars])
        max_chars -= len(taken[-1])
        if max_chars <= 0:
            break
    return taken


def measure(
    texts: list[str], tokenizer: Tokenizer, others: dict[str, Callable[[str], list[int]]]
) -> dict:
    encoded = tokenizer.encode_batch(texts)
    chars, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)

    def per(tokens: int) -> dict[str, float]:
        return {
            "tokens": tokens,
            "chars_per_token": round(chars / max(1, tokens), 4),
            "bytes_per_token": round(size / max(1, tokens), 4),
        }

    row = {"chars": chars, "bytes": size, **per(sum(map(len, encoded)))}
    row["exact"] = all(
        tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True)
    )
    for name, encode in others.items():
        row[name] = per(sum(len(encode(segment)) for text in texts for segment in segments(text)))
    return row


def show(rows: dict[str, dict], names: Sequence[str]) -> None:
    """A table: characters and bytes a token, and the other vocabularies' bytes a token (how much more than theirs ours holds)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(box=box.SIMPLE)
    for i, title in enumerate(
        [
            "text",
            "characters",
            "chars/token",
            "bytes/token",
            *(f"{name} bytes/token" for name in names),
        ]
    ):
        table.add_column(title, justify="left" if i == 0 else "right")
    for name, row in rows.items():
        theirs = [
            f"{row[n]['bytes_per_token']:.2f} ({row['bytes_per_token'] / row[n]['bytes_per_token'] - 1:+.0%})"
            for n in names
        ]
        table.add_row(
            name,
            f"{row['chars']:,}",
            f"{row['chars_per_token']:.2f}",
            f"{row['bytes_per_token']:.2f}",
            *theirs,
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> dict:
    k, _ = knobs.parse(Knobs, argv, command="tok_eval", description=__doc__ or "")
    tokenizer = Tokenizer.load()
    sources = training_sources(k.data)
    others = other_encodings(k.wait)
    rows = {
        source.name: measure(capped(documents(source, "val"), k.max_chars), tokenizer, others)
        for source in sources
    }
    rows.update({f"({kind})": measure([text], tokenizer, others) for kind, text in KINDS.items()})
    print0(
        f"tokenizer of {tokenizer.vocab_size:,} tokens; texts in parentheses stand in this command, the others are validation text"
    )
    show(rows, list(others))
    if inexact := [name for name, row in rows.items() if not row["exact"]]:
        raise UserError(
            f"the tokenizer changes the text of {', '.join(inexact)}: train it again with python -m scripts.tok_train"
        )
    result = {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "compared_with": list(others),
        "texts": rows,
    }
    print0(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    entry(main)
