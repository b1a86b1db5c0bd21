"""
The page that dev/generate_rap_prior.py writes beside a prior: its rules in words, what it is worth,
its ranks, and pictures of B. It needs no script, no other file and no network.
"""

import io
import re
from argparse import Namespace
from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
import rap_terms
from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       background: #fff; color: #222 }
table { border-collapse: collapse } svg { max-width: 100% }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #ccc }
"""


def report(
    a: Namespace,
    terms: dict,
    rules: list,
    about: dict,
    strength: dict,
    held: rap_terms.Text,
    tokens: list[bytes],
) -> str:
    """The page as HTML: the rules, what they are worth, and pictures of B."""

    def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        lines = [("th", heads), *(("td", row) for row in rows)]
        return (
            "<table>"
            + "".join(
                "<tr>" + "".join(f"<{tag}>{escape(str(x))}</{tag}>" for x in row)
                for tag, row in lines
            )
            + "</table>"
        )

    n, seconds, size = about["tokens"], about["seconds"], about["rss_bytes"] / 1e9
    out = [
        f"<h1>Attention prior: {a.generator}</h1><p>{n:,} tokens of the training split, "
        f"{about['pairs']:,} pairs, half of them useful; "
    ]
    out.append(f"{seconds:.0f} seconds, {size:.2f} GB.</p>")
    told: list[tuple] = [
        ("the prior, on held-out pairs", f"{about['auc']:.3f}", f"{about['youden']:.3f}")
    ]
    if rules:
        told.append(
            (
                "the fitted rules, cross-validated in three folds",
                *(f"{x:.3f}" for x in about["fit"]),
            )
        )
        ranges = [
            "..".join("" if x is None else f"{x:.3g}" for x in (r.low, r.high)) for r in rules
        ]
        rows = [
            (f"+{2 * abs(r.weight):.2f}", r.words(), c, rap_terms.FEATURES[r.feature][1])
            for r, c in zip(rules, ranges, strict=True)
        ]
        out.append(
            "<h2>Rules</h2><p>What makes a key more useful, in log odds, and the critical range "
            "of keys that are not:</p>"
        )
        out.append(table(("log odds", "a key is more useful if", "critical range", "term"), rows))
        out.append(
            f"<p>Polished to logic: {escape(about['polished'])} (Youden's J "
            f"{about['polished_youden']:.3f}).</p>"
        )
    out.append(
        "<h2>How well it distinguishes useful keys</h2>" + table(("", "AUC", "Youden's J"), told)
    )
    out.append(
        "<p>A single head that attends by the prior alone and copies, mixed into a bigram table, "
        "reduces its loss by "
    )
    out.append(
        f"{about['gain']:.3f} of {about['base']:.3f} nats per token on held-out rows "
        f"of {about['row']} tokens; "
    )
    out.append(f"a head that attends evenly reduces it by {about['even']:.3f}.</p>")
    needs, gates, alone = ranks(terms), about["gates"], about["alone"]
    rows = [
        (g, f"{strength[g]:.2f}", needs[g][0], f"{needs[g][1]:.2g}", gates[g], f"{alone[g]:.3f}")
        for g in strength
    ]
    out.append(
        table(
            (
                "term",
                "strength, log odds",
                "rank",
                "largest error",
                "its gate in that head",
                "gain with it alone, nats",
            ),
            rows,
        )
    )
    if "spans" in terms:
        told_spans = [
            (f"{low}" if low == high else f"{low} to {high}", f"{nats:.3f}")
            for low, high, nats in about["spans"]
        ]
        out.append(
            "<h2>Spans</h2><p>Initially, one head each attends to these distances and to no "
            "others:</p>"
        )
        out.append(
            table(("distance", "information of the first about the next token, nats"), told_spans)
        )
    out.append("<h2>Pictures</h2>" + pictures(terms, gates, held, tokens))
    head = f'<meta charset="utf-8"><title>Attention prior</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(out)}</html>\n'


def pictures(
    terms: dict, gates: dict[str, float], held: rap_terms.Text, tokens: list[bytes]
) -> str:
    """SVG: the lag curve, and softmax(B) on the first 40 tokens of a held-out document."""
    n = 40
    first = next(
        (b for b in np.unique(held.begin) if b + n <= len(held.ids) and held.begin[b + n - 1] == b),
        0,
    )
    ids = held.ids[first : first + n]
    words = [
        tokens[t].decode("utf-8", "replace").replace("\n", "\u21b5").replace("$", r"\$") or "\u25ae"
        for t in ids
    ]
    score = sum(
        m[0] * max(gates.get(g, 0), 1) for g, m in rap_terms.matrices(terms, ids[None]).items()
    )
    weight = np.exp(np.where(np.tril(np.ones((n, n), bool)), score, -np.inf))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rap", "font.size": 8}):
        figure = Figure(figsize=(9, 12.5))
        top, below = figure.subplots(2, 1, height_ratios=(1, 3))
        if "lag" in terms:
            top.plot(np.arange(1, len(terms["lag"]) + 1), terms["lag"])
            top.set_xscale("log")
        top.set_title("lag: the worth of a key by 1 + its distance")
        below.imshow(weight / weight.sum(1, keepdims=True), cmap="Greys", vmax=0.5)
        below.set_xticks(range(n), words, rotation=90)
        below.set_yticks(range(n), words)
        below.set_title("where each token (row) attends by the prior alone")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(
        r".*?(<svg.*?)<metadata>.*?</metadata>", r"\1", buffer.getvalue(), count=1, flags=re.DOTALL
    )


def ranks(terms: dict, error: float = 0.02, T: int = 512) -> dict[str, tuple[int, float]]:
    """
    The columns that each group needs beside q and k, and the largest error; lag is a truncated SVD,
    free above the diagonal.
    """
    out = {"key": (1, 0.0)} if "key" in terms else {}
    if "match" in terms:
        out["match"] = (
            int(np.linalg.matrix_rank(np.concatenate(list(terms["match"]), 1), rtol=1e-6)),
            0.0,
        )
    if "pair" in terms:
        out["pair"] = int(np.count_nonzero(terms["pair"])), 0.0
    if "lag" in terms:
        left = rap_terms.matrices(
            {"lag": terms["lag"]}, np.zeros((1, min(T, len(terms["lag"]))), int)
        )["lag"][0].astype(np.float64)
        (u, s, v), rank = np.linalg.svd(left), 0
        while (worst := float(np.abs(np.tril(left)).max())) > error and rank < len(s):
            left, rank = left - s[rank] * np.outer(u[:, rank], v[rank]), rank + 1
        out["lag"] = rank, worst
    return out
