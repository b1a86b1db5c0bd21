"""
Write invented tables of comma-separated values as training text, for trials on a text in which the
columns of a row depend on those of the row above: one JSON line {"text": ...} per table.

    python dev/made_tables.py tables.jsonl
"""

import json
import os
import random
import sys
from pathlib import Path

SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "do",
    "ka",
    "ke",
    "ko",
    "la",
    "le",
    "lo",
    "ma",
    "me",
    "mo",
    "na",
    "ne",
    "no",
    "ra",
    "re",
    "ro",
    "sa",
    "se",
    "so",
    "ta",
    "te",
    "to",
]
COLUMNS = ["place", "person", "product", "kind", "state", "unit", "owner", "colour"]


def word(rng: random.Random) -> str:
    """An invented name."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))).capitalize()


def table(rng: random.Random) -> str:
    """
    One table: a running number, three to six columns of names, and a price. A name is that of the
    row above in three rows of five; otherwise one of the dozen of its column. The price is that of
    the first column's name.
    """
    names = rng.sample(COLUMNS, rng.randint(3, 6))
    pools = [[word(rng) for _ in range(12)] for _ in names]
    prices = {name: f"{rng.randint(1, 99)}.{rng.randint(0, 99):02d}" for name in pools[0]}
    number, row = rng.randint(1, 900), [rng.choice(pool) for pool in pools]
    lines = [",".join(["number", *names, "price"])]
    for _ in range(rng.randint(20, 80)):
        row = [
            name if rng.random() < 0.6 else rng.choice(pool)
            for name, pool in zip(row, pools, strict=True)
        ]
        lines.append(",".join([str(number), *row, prices[row[0]]]))
        number += 1
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2:
        print(
            "error: give the file to write, as in python dev/made_tables.py tables.jsonl",
            file=sys.stderr,
        )
        sys.exit(2)
    rng, out = random.Random(0), Path(sys.argv[1])
    beside = out.with_name(out.name + ".new")
    lines = (json.dumps({"text": table(rng)}) + "\n" for _ in range(6000))
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, out)


if __name__ == "__main__":
    main()
