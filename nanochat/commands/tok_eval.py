"""
Measure how well the tokenizer compresses: characters and bytes per token, for validation text of
each data source and for sample texts of several kinds, compared with the GPT-2 and GPT-4
vocabularies if these can be downloaded. The last line of the output is JSON.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat.base.common import UserError, columns, entry, notice, print0
from nanochat.base.knobs import ReadingKnobs, knob, parse
from nanochat.data.sources import mixed, training_sources
from nanochat.data.tokenizer import Tokenizer, segments

PUBLISHED = {"gpt2": "gpt2", "gpt4": "cl100k_base"}  # name in the table -> name in tiktoken
Encode = Callable[[str], list[int]]

SAMPLES = {
    "english": """\
The ferry leaves the island at a quarter past six, and whoever misses it stays until morning. \
Marta knew this as well as anybody; still, she stopped at the bakery, because the smell of warm \
bread had come all the way down to the harbour to fetch her. "You'll never make it," said the \
baker, counting out her change. "I don't think the captain would leave without his breakfast," \
she replied, and took a second loaf. Scientists have measured how long people are willing to \
wait for something they want. The answer depends less on patience than on whether a clock is in \
sight: take it off the wall, and most of us stay twice as long.""",
    "code": '''\
def running_mean(values: list[float], width: int = 3) -> list[float]:
    """Mean of the last `width` values at each place."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        means.append(total / min(i + 1, width))
    return means


if __name__ == "__main__":
    print(running_mean([1, 2, 4, 8.5], width=2))

for (size_t i = 0; i < rows; ++i) {
    if (!table[i].empty()) { sum += table[i].front()->weight; }
}
SELECT name, COUNT(*) AS n FROM visits WHERE year >= 2019 GROUP BY name ORDER BY n DESC;
''',
    "maths": """\
A train covers 318 km in 2.5 h, so its mean speed is 318 / 2.5 = 127.2 km/h. For what n does 3n \
+ 7 = 100 hold? n = 31.
Let $f(x) = x^3 - 6x^2 + 11x - 6$. Since $f(1) = f(2) = f(3) = 0$, we have $f(x) = (x - 1)(x - \
2)(x - 3)$ and $\\int_0^1 f(x)\\,dx = \\frac{1}{4} - 2 + \\frac{11}{2} - 6 = -\\frac{9}{4}$.
17 x 23 = 391; 1,048,576 = 2^20; 45 % of 2,340 is 1,053; pi begins 3.14159265358979. If a < b \
and c >= 0 then ac <= bc.
""",
    "other languages": """\
Der Zug fährt um halb sieben ab, und wer ihn verpasst, muss über Nacht bleiben. La boulangère \
m'a rendu la monnaie sans lever les yeux. ¿Quién dejó la ventana abierta? Утром на озере было \
тихо, только скрипели вёсла. Η θάλασσα ήταν ήρεμη. كان الطريق طويلا والليل هادئا.""",
    "cjk": """\
早上六点一刻，渡船离开小岛，没赶上的人只好等到第二天。她还是在面包店停了下来。「間に合わないよ」とパン屋は言った。それでも彼女はもう一つ買った。시계를 벽에서 떼어 내면 사람들은 두 배나 \
오래 기다린다고 한다.""",
    "emoji": """\
Good morning ☀️🥐! On the boat ⛴️ now, wind 💨💨 but happy 😄🙌🏽 — call you tonight 📞❤️ 👩‍🚀👨‍👩‍👧 \
🇫🇮🇯🇵 ✅ 3️⃣""",
}


@dataclass(kw_only=True)
class EvaluateTokenizerKnobs(ReadingKnobs):
    """Tokenizer evaluation"""

    data: tuple[str, ...] = knob(
        (), "sources to measure on, as for base_train (default: downloaded shards, else tinyworld)"
    )
    max_chars: int = knob(2_000_000, "measure about this many characters per source", low=1)
    wait: float = knob(
        20.0,
        "seconds to wait for the download of the GPT-2 and GPT-4 vocabularies (0 = skip them)",
        low=0.0,
    )


def published_encodings(seconds: float) -> dict[str, Encode]:
    """
    {name: encoder} of the published vocabularies that are downloaded within so many seconds; a
    notice names the others.
    """
    encodings: dict[str, Encode] = {}
    problem = f"no answer within {seconds:g} s"

    def download() -> None:
        nonlocal problem
        import tiktoken

        try:
            for name, published in PUBLISHED.items():
                encodings[name] = tiktoken.get_encoding(published).encode_ordinary
        except Exception as e:  # the network, a proxy or a damaged cache can raise anything
            problem = type(e).__name__

    thread = threading.Thread(target=download, daemon=True)  # tiktoken itself has no timeout
    thread.start()
    thread.join(seconds)
    arrived = dict(encodings)
    if missing := [name for name in PUBLISHED if name not in arrived]:
        notice(
            f"cannot download the vocabularies of {' and '.join(missing)} ({problem}): they are "
            "left out of the comparison"
        )
    return arrived


def measure(texts: list[str], tokenizer: Tokenizer, published: dict[str, Encode]) -> dict:
    """
    The sizes of the texts, their compression by this tokenizer and by the published ones, and
    whether decoding restores the texts ("exact").
    """
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)

    def compression(tokens: int) -> dict[str, float]:
        return {
            "tokens": tokens,
            "chars_per_token": round(characters / max(1, tokens), 4),
            "bytes_per_token": round(size / max(1, tokens), 4),
        }

    encoded = tokenizer.encode_batch(texts)
    row = {"chars": characters, "bytes": size, **compression(sum(map(len, encoded)))}
    row["exact"] = [tokenizer.decode(ids) for ids in encoded] == texts
    for name, encode in published.items():
        tokens = sum(len(encode(segment)) for text in texts for segment in segments(text))
        row[name] = compression(tokens)
    return row


def table(rows: dict[str, dict], names: Sequence[str]) -> str:
    """
    A table for a terminal: characters and bytes per token of our tokenizer, and the bytes per token
    of each published vocabulary in `names`, with ours relative to it in percent.
    """
    head = ["text", "characters", "chars/token", "bytes/token"]
    cells = []
    for name, row in rows.items():
        ours = row["bytes_per_token"]
        theirs = [row[n]["bytes_per_token"] for n in names]
        figures = [f"{row['chars']:,}", f"{row['chars_per_token']:.2f}", f"{ours:.2f}"]
        cells.append([name, *figures, *(f"{t:.2f} ({ours / t - 1:+.0%})" for t in theirs)])
    return columns([*head, *(f"{name} bytes/token" for name in names)], cells)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table and a line of JSON; returns what that line holds."""
    knobs, _ = parse(EvaluateTokenizerKnobs, argv, command="tok_eval")
    tokenizer = Tokenizer.load()
    sources = training_sources(knobs.data, knobs.skip_bad_rows)
    published = published_encodings(knobs.wait) if knobs.wait else {}
    texts = {
        source.name: list(mixed([source], "val", max_chars=knobs.max_chars)) for source in sources
    }
    texts |= {f"({kind})": [sample] for kind, sample in SAMPLES.items()}
    rows = {name: measure(texts[name], tokenizer, published) for name in texts}
    print0(
        f"tokenizer with {tokenizer.vocab_size:,} tokens, on validation text and, in parentheses, "
        "on sample texts of this command\n"
    )
    print0(table(rows, list(published)) + "\n")
    if inexact := [name for name, row in rows.items() if not row["exact"]]:
        raise UserError(
            f"the tokenizer changes the text of {', '.join(inexact)}: train it again with "
            "nanochat tok_train"
        )
    result = {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "compared_with": list(published),
        "texts": rows,
    }
    print0(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    entry(main)
