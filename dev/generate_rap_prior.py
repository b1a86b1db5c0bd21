# /// script
# requires-python = ">=3.11"
# dependencies = ["cutlass[plots]==0.9.0", "numpy>=2.0", "safetensors>=0.5"]
# ///
"""
Compute an attention prior (rap_prior.safetensors) from the token shards of a run, with a report of
what it says. It runs in an environment of its own, because `cutlass`, the rectified LASSO that
finds the rules, has the same name as a package of NVIDIA's that torch imports:

    python dev/generate_rap_prior.py --env ~/.cache/nanochat/rap_env   (creates it if needed)
    uv run dev/generate_rap_prior.py                                   (if uv is installed)
    python dev/generate_rap_prior.py --generator hand                  (no text, no environment)

A pair (i, j) of positions is useful if the token at j is the next one, x[i + 1]. Pairs are sampled
within documents of the training split. The generator `rules` fits which features of a pair make it
useful (the positive class is "not useful", so that rare matches lie outside its critical ranges)
and turns the coefficients into terms of B. `rectified` takes the difference between useful and
other pairs in the co-activation of rectified token features. `correlation` does the same with raw
features (and with random codes for two tokens) and needs no cutlass. `hand` fits nothing: its rules
are written down in rap_terms.py; it reads the tokenizer alone, needs no cutlass, and takes a
second. nanochat/model/prior_artifact.py describes the terms.

The script reads token shards of format 2 itself and imports neither nanochat nor torch. It refuses
the validation split, tokens of another tokenizer, and any `cutlass` but version 0.9.0 of the LASSO
package. The tensors depend only on the tokens, the options and the seed.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from importlib import import_module, metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1"
SHARD_FORMAT = 2  # of nanochat/data/shards.py
CUTLASS = "0.9.0"
MIN_TOKENS = 20_000  # fewer show no rule
MOST_DOUBLING = 17  # spans, each twice as long as the one before
GENERATORS = "rules", "rectified", "correlation", "hand"
# the options that `hand` obeys
BY_HAND = [
    "generator",
    "tokenizer",
    "out",
    "features",
    "code_bits",
    "pair_bits",
    "spans",
    "seed",
    "env",
]
GROUPS = "lag", "key", "match", "pair"


class UserError(Exception):
    """A mistake that the user can fix: what is wrong, the value, and the fix."""


def command_line() -> argparse.ArgumentParser:
    """The options of the generator, with their defaults."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--generator", choices=GENERATORS, default="rules", help="how the prior is computed")
    add("--tokenizer", type=Path, default=base / "tokenizer", help="folder of the tokenizer")
    add(
        "--tokens",
        type=Path,
        default=base / "tokens",
        help="folder of the token shards, as tok_data or base_train write them",
    )
    add(
        "--out",
        type=Path,
        default=base / "rap" / "rap_prior.safetensors",
        help="file to write; the report goes beside it, as .html",
    )
    add(
        "--mix",
        nargs="+",
        default=[],
        metavar="NAME:WEIGHT",
        help="sources and their shares, as in the run; without it all sources, by size",
    )
    add("--max_tokens", type=int, default=20_000_000, help="maximum number of tokens to read")
    add("--pairs", type=int, default=20_000, help="pairs to fit on, half of them useful")
    add(
        "--others",
        choices=("random", "matched"),
        default="random",
        help="how pairs that are not useful are drawn; matched: with the distances and "
        "frequencies of useful ones",
    )
    add("--max_lag", type=int, default=1024, help="maximum distance of a key, in tokens")
    add(
        "--band",
        type=int,
        default=32,
        help="distance from which lag is 0 (0 = max_lag); what lies beyond it gained nothing and "
        "takes time at long contexts",
    )
    add(
        "--features",
        nargs="+",
        metavar="NAME",
        help="features that rules may use, from the list in rap_terms.py; without it all",
    )
    add(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        help="terms that the artifact may contain",
    )
    add(
        "--codes",
        choices=("next", "around", "hash"),
        default="next",
        help="what a token's code encodes: what follows it, what surrounds it, or nothing (random)",
    )
    add("--code_bits", type=int, default=32, help="bits of a token's code, the rank of match")
    add(
        "--pair_bits", type=int, default=32, help="bits of the code of two tokens, the rank of pair"
    )
    add(
        "--spans",
        type=int,
        default=4,
        help="maximum number of spans of distances, one head each; fitted ones need lag",
    )
    add(
        "--lag_from",
        choices=("event", "information"),
        default="event",
        help="lag: log odds of the event, or mutual information",
    )
    add(
        "--sparsity",
        type=float,
        default=0.0,
        help="share of the weakest entries of each term to set to 0",
    )
    add("--seed", type=int, default=0, help="seed of every random choice")
    add(
        "--env",
        type=Path,
        nargs="?",
        const=base / "rap_env",
        help="run in the environment in this folder, which is created if needed; hand needs none",
    )
    return parser


# ----
# Reading


class Vocabulary(NamedTuple):
    tokens: list[bytes]  # special ones are empty
    fingerprint: str


def read_tokenizer(folder: Path) -> Vocabulary:
    """The bytes of every token. Raises UserError if the tokenizer is missing or damaged."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"there is no tokenizer in {folder}: train one with python -m scripts.tok_train, or "
            "name another with --tokenizer"
        )
    visible = {
        *range(0x21, 0x7F),
        *range(0xA1, 0xAD),
        *range(0xAE, 0x100),
    }  # how GPT-2 spells bytes
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        spelled = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"][
            "vocab"
        ]
        tokens = [b""] * meta["vocab_size"]
        for token, i in spelled.items():
            tokens[i] = bytes(byte_of[c] for c in token)
        return Vocabulary(tokens, meta["fingerprint"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise UserError(
            f"the tokenizer in {folder} is damaged ({type(e).__name__}): train one with python "
            "-m scripts.tok_train"
        ) from e


def kinds(tokens: list[bytes]) -> dict[str, Any]:
    """Which tokens are of each kind, (V,) bool."""
    import numpy as np

    looks = {
        "word": rb" [A-Za-z\x80-\xff].*",
        "mark": rb" ?[!-/:-@\[-`{-~]+",
        "digit": rb" ?[0-9]+",
        "newline": rb".*\n.*",
    }
    return {
        name: np.array([bool(re.fullmatch(look, t, re.DOTALL)) for t in tokens])
        for name, look in looks.items()
    }


def find_shards(folder: Path, fingerprint: str) -> dict[str, list[tuple[Path, dict]]]:
    """
    The training shards of text made with this tokenizer, by source. UserError if there are none.
    When a text changes, the shards of its older version stay, and may hold what is validation text
    now. The shards that were used together last have the same time; all others are left out.
    """
    shards: dict[str, list] = {}
    validation = others = 0
    for path in sorted(folder.glob("*/meta.json")):
        m = re.fullmatch(r"(.+)-(train|val)-[0-9a-f]{16}", path.parent.name)
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if not m or meta["mask"]:
                continue  # conversations
            if meta["format"] < SHARD_FORMAT:
                continue  # left by an earlier version, which training does not read either
            if meta["format"] != SHARD_FORMAT:
                raise UserError(
                    f"the token shard {path.parent} has format {meta['format']}, this generator "
                    f"reads {SHARD_FORMAT}"
                )
            if meta["tokenizer"] != fingerprint:
                others += 1
            elif m[2] == "val":
                validation += 1
            elif (path.parent / "tokens.bin").stat().st_size != meta["tokens"] * (
                2 if meta["dtype"] == "uint16" else 4
            ):
                raise ValueError("size")
            else:
                shards.setdefault(m[1], []).append((path.parent, meta))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"the token shard {path.parent} is damaged ({type(e).__name__}): delete it and "
                "train again"
            ) from e
    if not shards:
        why = (
            "only validation shards, which no prior may see"
            if validation
            else "no training shards of text"
        )
        why += f" ({others} shards are of another tokenizer)" if others and not validation else ""
        raise UserError(
            f"{folder} holds {why}: let base_train tokenise the data first, or name the folder "
            "with --tokens"
        )
    for name, found in shards.items():
        used = [folder.stat().st_mtime for folder, _ in found]
        shards[name] = [one for one, at in zip(found, used, strict=True) if at == max(used)]
        if older := len(found) - len(shards[name]):
            print(
                f"left out {older} of {len(found)} shards of {name}, which tok_data or "
                "training did not use last; if they belong to the text, run tok_data again"
            )
    return shards


def parse_mix(mix: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The shares of the sources, which sum to 1, from NAME:WEIGHT items; {} without any."""
    shares = {}
    for item in mix:
        m = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", item)
        if not m or float(m[2]) <= 0:
            raise UserError(
                f"--mix {item} is not NAME:WEIGHT with a positive weight: write for example "
                f"{next(iter(names))}:0.5"
            )
        if m[1] not in names:
            raise UserError(
                f"--mix {item}: there are no training shards of {m[1]}, only of {', '.join(names)}"
            )
        shares[m[1]] = float(m[2])
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def read_text(
    shards: dict[str, list[tuple[Path, dict]]], shares: dict[str, float], limit: int, rng: Any
) -> tuple[Any, Any]:
    """
    Random documents of each source up to its share of `limit` tokens, as (Text to fit on, held-out
    Text, a twentieth). A source that has fewer is repeated, as in training, but never into the
    held-out text.
    """
    import numpy as np

    sizes = {name: sum(meta["tokens"] for _, meta in parts) for name, parts in shards.items()}
    if (total := sum(sizes[name] for name in shares or sizes)) < MIN_TOKENS:
        raise UserError(
            f"the training split holds {total:,} tokens, too few to show a rule: at least "
            f"{MIN_TOKENS:,} are needed"
        )
    if not shares:
        shares, limit = (
            {name: size / total for name, size in sizes.items() if size},
            min(limit, total),
        )
    fitted, held = [], []
    for name, share in shares.items():
        documents = []
        for folder, meta in shards[name]:
            ids = (
                np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
                if meta["tokens"]
                else np.zeros(0, np.uint16)
            )
            documents += [ids[a:b] for a, b in pairwise(np.load(folder / "offsets.npy").tolist())]
        if len(documents) < 2:
            raise UserError(
                f"the training split of {name} has fewer than two documents: give it more, or "
                "leave it out of --mix"
            )
        order, wanted = rng.permutation(len(documents)), limit * share
        first = held_tokens = 0
        while held_tokens < min(wanted, sizes[name]) / 20 and first < len(order) - 1:
            held.append(documents[order[first]])
            held_tokens += len(held[-1])
            first += 1
        rest = order[first:]
        lengths = np.cumsum([len(documents[i]) for i in rest])
        repeats, remainder = divmod(max(0.0, wanted - held_tokens), int(lengths[-1]))
        last = int(np.searchsorted(lengths, remainder))
        for n in [len(rest)] * int(repeats) + [last or int(not repeats)]:
            fitted += [documents[i] for i in rest[:n]]
    return joined(fitted, rng), joined(held, rng)


def joined(documents: list, rng: Any) -> Any:
    """A Text of the documents in random order."""
    import numpy as np
    from rap_terms import Text

    documents = [documents[k] for k in rng.permutation(len(documents))]
    lengths = np.array([len(d) for d in documents])
    return Text(
        np.concatenate(documents).astype(np.int32), np.repeat(np.cumsum(lengths) - lengths, lengths)
    )


def load_cutlass() -> Any:
    """The rectified LASSO. Raises UserError if it is missing, of another version, or NVIDIA's."""
    remedy = "run this file with --env, or with uv run"
    try:
        version = metadata.version("cutlass")
    except metadata.PackageNotFoundError:
        spec = util.find_spec("cutlass")
        if spec is None:
            raise UserError(
                f"cutlass {CUTLASS}, the rectified LASSO, is not installed here: {remedy}"
            ) from None
        where = spec.origin or "a folder"
        raise UserError(
            f"the cutlass here ({where}) is NVIDIA's or another's, not the rectified LASSO "
            f"{CUTLASS}: {remedy}"
        ) from None
    if version != CUTLASS:
        raise UserError(
            f"cutlass is installed in version {version}, and this generator was written for "
            f"{CUTLASS}: {remedy}"
        )
    cutlass = import_module("cutlass")
    if not hasattr(cutlass, "CutlassClassifier"):
        raise UserError(
            f"NVIDIA's cutlass ({cutlass.__file__}) hides the rectified LASSO {CUTLASS} here: "
            f"{remedy}"
        )
    return cutlass


# ----
# Generating


def run_in(folder: Path, argv: Sequence[str]) -> int:
    """Run this file in an environment with its requirements, created if needed; the exit status."""
    import venv

    head = re.findall(
        r"^# (dependencies = .*)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE
    )[0]
    needs = tomllib.loads(head)["dependencies"]
    python, done = (
        folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"),
        folder / "rap_needs.json",
    )
    if not (python.exists() and done.exists() and json.loads(done.read_text()) == needs):
        print(f"creating an environment in {folder} with {', '.join(needs)}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as e:
            raise UserError(
                f"cannot create an environment in {folder} ({e}): name another folder with "
                "--env, or use uv run"
            ) from e
        pip = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *needs], capture_output=True, text=True
        )
        if pip.returncode:
            last = (pip.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(
                f"pip could not install {', '.join(needs)} ({last}): fix that and run again"
            )
        done.write_text(json.dumps(needs))
    return subprocess.run([python, __file__, *argv]).returncode


def peak_bytes() -> int:
    """The peak memory of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def check(options: argparse.Namespace) -> None:
    """Raises UserError for an option outside its range."""
    limits = {
        "code_bits": (2, 256),
        "pair_bits": (2, 256),
        "max_lag": (16, 65536),
        "spans": (0, 64),
    }
    limits |= {"pairs": (200, 10**6), "sparsity": (0, 0.999), "band": (0, 65536)}
    limits |= {"max_tokens": (MIN_TOKENS, 10**12), "seed": (0, 10**9)}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(
                f"--{name} {value} is out of range: give a value from {low:g} to {high:g}"
            )


def check_features(wanted: Sequence[str] | None, known: dict[str, Any]) -> None:
    """Raises UserError for a feature that the generator does not know."""
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise UserError(f"--features has no feature {unknown[0]}: choose from {', '.join(known)}")


class Corpus(NamedTuple):
    """What the prior is computed from: the training text, and a held-out twentieth of it."""

    vocabulary: Vocabulary
    shards: dict[str, list[tuple[Path, dict]]]
    text: Any  # rap_terms.Text
    held: Any

    @property
    def split(self) -> str:
        """The SHA-256 that identifies the shards."""
        digests = sorted(meta["sha256"] for shards in self.shards.values() for _, meta in shards)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_corpus(options: argparse.Namespace, rng: Any) -> Corpus:
    """Read the tokenizer and as much of the training split as the options ask for."""
    vocabulary = read_tokenizer(options.tokenizer)
    shards = find_shards(options.tokens, vocabulary.fingerprint)
    shares = parse_mix(options.mix, list(shards))
    text, held = read_text(shards, shares, options.max_tokens, rng)
    sources = ", ".join(f"{name} (shards: {len(found)})" for name, found in shards.items())
    print(
        f"read {len(text.ids):,} tokens of {sources}; {len(held.ids):,} more are held out",
        flush=True,
    )
    return Corpus(vocabulary, shards, text, held)


class Codes(NamedTuple):
    """The codes of tokens: what the terms `match` and `pair` compare."""

    embedding: Any  # (V, code_bits) float32
    codes: Any  # (V, code_bits) int8, each -1 or 1
    query: Any  # (V, pair_bits): the code of the earlier of two tokens
    now: Any  # (V, pair_bits): the code of the later one
    ranges: dict[str, list]  # the critical range of each bit


def make_codes(
    options: argparse.Namespace, cutlass: Any, text: Any, pairs: Any, vocab_size: int, rng: Any
) -> Codes:
    """
    Random codes, of which three quarters are replaced by rectified embeddings unless the options
    ask for random ones; the rest distinguishes tokens of the same kind.
    """
    import numpy as np
    import rap_terms

    bits, kind = options.code_bits, "next" if options.codes == "hash" else options.codes
    embedding = rap_terms.embed(text.ids, vocab_size, bits, kind)
    codes, ranges = rng.choice(np.array([-1, 1], np.int8), (vocab_size, bits)), {}
    if cutlass and options.codes != "hash":
        rectified, ranges = rap_terms.rectified_codes(cutlass, embedding, text, pairs)
        kept = slice(None, -(bits // 4))
        codes[:, kept] = rectified[:, kept]
    query, now = rap_terms.pair_codes(codes, options.pair_bits)
    return Codes(embedding, codes, query, now, ranges)


class Fit(NamedTuple):
    """
    Terms as a generator found them, and for `rules` the rules and what the fit says of itself.
    """

    terms: dict[str, Any]
    rules: list
    about: dict[str, Any]


def fit(options: argparse.Namespace, cutlass: Any, corpus: Corpus, pairs: Any, codes: Codes) -> Fit:
    """The terms of B, by the generator that the options name."""
    import rap_terms

    vocab_size, ids = len(corpus.vocabulary.tokens), corpus.text.ids
    curves = {
        "lag": rap_terms.lag_curve(ids, options.max_lag, options.lag_from),
        "key": rap_terms.key_worth(corpus.text, vocab_size, options.max_lag),
    }
    rules, about, code = [], {}, codes.codes
    pair_codes = codes.query, codes.now
    print(f"fitting: {options.generator}", flush=True)
    if options.generator == "rules":
        raw = pair_features(options, corpus, pairs, codes.embedding)
        rules, about = rap_terms.fit_rules(cutlass, raw, pairs.useful, options.seed)
        terms = rap_terms.rules_terms(
            rules, raw, curves, ids, pairs, options.code_bits, options.pair_bits
        )
        codes.ranges.update({f"{r.feature} {n}": [r.low, r.high] for n, r in enumerate(rules)})
    elif options.generator == "rectified":
        terms = curves | rap_terms.difference_terms(ids, pairs, code.astype(float), pair_codes)
    else:
        code, whole = rap_terms.spell(codes.embedding)
        terms = curves | rap_terms.difference_terms(ids, pairs, code @ whole.T, pair_codes)
        terms["match"] = whole.T @ terms["match"] @ whole
    terms |= {"codes": code, "pair_query": codes.query, "pair_now": codes.now}
    about["spans"] = rap_terms.find_spans(ids, options.max_lag, options.spans)
    if about["spans"]:
        terms["spans"] = span_masks(about["spans"], len(terms.get("lag", curves["lag"])))
    return Fit(terms, rules, about)


def pair_features(
    options: argparse.Namespace, corpus: Corpus, pairs: Any, embedding: Any
) -> dict[str, Any]:
    """The features of the pairs that rules may use, by name."""
    import numpy as np
    import rap_terms

    ids, tokens = corpus.text.ids, corpus.vocabulary.tokens
    share = (np.bincount(ids, minlength=len(tokens)) + 0.5) / len(ids)
    wanted = options.features or list(rap_terms.FEATURES)
    return rap_terms.columns(corpus.text, pairs, wanted, share, kinds(tokens), embedding)


def span_masks(spans: Sequence[tuple[int, int, float]], length: int) -> Any:
    """(spans, length) bool: the distances that each span covers."""
    import numpy as np

    distance = np.arange(length)
    return np.stack([(first <= distance) & (distance <= last) for first, last, _ in spans])


def generate(options: argparse.Namespace) -> None:
    """Compute a prior, measure it on held-out text, and write it with its report."""
    began = time.monotonic()
    check(options)
    cutlass = None if options.generator == "correlation" else load_cutlass()
    import numpy as np
    import rap_terms
    from rap_report import report
    from rap_worth import measure
    from safetensors.numpy import save

    check_features(options.features, rap_terms.FEATURES)
    rng = np.random.default_rng(options.seed)
    corpus = read_corpus(options, rng)
    text, held = corpus.text, corpus.held
    vocab_size, matched = len(corpus.vocabulary.tokens), options.others == "matched"
    pairs = rap_terms.sample_pairs(text, options.pairs, options.max_lag, rng, matched)
    n_unseen = min(options.pairs, 10_000)
    unseen = rap_terms.sample_pairs(held, n_unseen, options.max_lag, rng, matched)
    codes = make_codes(options, cutlass, text, pairs, vocab_size, rng)
    fitted = fit(options, cutlass, corpus, pairs, codes)
    terms, strength = rap_terms.finish(fitted.terms, options, text.ids, pairs)
    print("measuring on held-out text", flush=True)
    row = min(512, options.max_lag)
    about = fitted.about | measure(terms, strength, text, held, unseen, vocab_size, row)
    about |= {"pairs": options.pairs, "tokens": len(text.ids), "rss_bytes": peak_bytes()}
    about["seconds"] = round(time.monotonic() - began, 1)
    lines = rule_lines(fitted)
    numbers = ("auc", "youden", "fit", "gain", "seconds", "rss_bytes", "pairs", "tokens")
    meta = origin(options, corpus.vocabulary) | {
        "cutlass": CUTLASS if cutlass else "none",
        "split": corpus.split,
        "rules": json.dumps(lines),
        "ranges": json.dumps(codes.ranges),
        "sparsity": json.dumps(options.sparsity),
        "strength": json.dumps(strength),
        "report": json.dumps({name: about[name] for name in numbers if name in about}),
        "gates": json.dumps(about["gates"]),
        "spans": json.dumps(about["spans"] if "spans" in terms else []),
    }
    write(options.out, save(terms, meta))
    tokens = corpus.vocabulary.tokens
    page = report(options, terms, fitted.rules, about, strength, held, tokens)
    write(options.out.with_suffix(".html"), page.encode())
    print_summary(options, terms, strength, about, lines)


def origin(options: argparse.Namespace, vocabulary: Vocabulary) -> dict[str, str]:
    """What the metadata of every artifact says: its format, generator, tokenizer and options."""
    plain = {name: v for name, v in vars(options).items() if not isinstance(v, Path)}
    return {
        "format": "rap-1",
        "generator": options.generator,
        "generator_version": VERSION,
        "tokenizer": vocabulary.fingerprint,
        "options": json.dumps(plain),
    }


def write_by_hand(options: argparse.Namespace) -> None:
    """
    Write the prior whose rules are written down in rap_terms.HAND. It depends on the tokenizer, the
    features, the bits, the spans and the seed. Raises UserError for an option that only fitted
    priors obey.
    """
    default = vars(command_line().parse_args([]))
    for name, value in vars(options).items():
        if name not in BY_HAND and value != default[name]:
            raise UserError(
                f"--{name} has no effect with --generator hand, which reads no text and fits "
                "nothing: leave it out, or choose another generator"
            )
    check(options)
    if options.spans > MOST_DOUBLING:
        raise UserError(
            f"--spans {options.spans} is out of range with --generator hand, whose spans double: "
            f"give at most {MOST_DOUBLING}"
        )
    import numpy as np
    import rap_terms
    from safetensors.numpy import save

    check_features(options.features, rap_terms.HAND)
    vocabulary = read_tokenizer(options.tokenizer)
    odds = {name: rap_terms.HAND[name] for name in options.features or rap_terms.HAND}
    bits, rng = (options.code_bits, options.pair_bits), np.random.default_rng(options.seed)
    terms = rap_terms.terms_by_hand(odds, len(vocabulary.tokens), *bits, options.spans, rng)
    lines = [f"{w:+.2f}: {rap_terms.FEATURES[name][0]}" for name, w in odds.items()]
    meta = origin(options, vocabulary) | {"cutlass": "none", "rules": json.dumps(lines)}
    write(options.out, save(terms, meta))
    for line in lines:
        print(f"  {line}")
    names = ", ".join(n for n in ("match", "pair", "spans") if n in terms)
    print(f"{names} in {options.out}, for {len(vocabulary.tokens):,} tokens")


def rule_lines(fitted: Fit) -> list[str]:
    """The rules in words with their log odds, and the polished rule; [] for other generators."""
    odds = [(2 * abs(rule.weight), rule.words()) for rule in fitted.rules]
    lines = [f"+{gain:.2f}: {words}" for gain, words in odds if gain >= 0.005]
    return [*lines, fitted.about["polished"]] if fitted.rules else []


def print_summary(
    options: argparse.Namespace,
    terms: dict[str, Any],
    strength: dict[str, float],
    about: dict[str, Any],
    lines: Sequence[str],
) -> None:
    """Print what the prior says and what it is worth."""
    if "spans" in terms:
        spans = [f"{a} to {b}" if b > a else str(a) for a, b, _ in about["spans"]]
        print(f"  one head each attends to the distances {', '.join(spans)}")
    for line in lines:
        print(f"  {line}")
    print(
        f"AUC {about['auc']:.3f}, Youden's J {about['youden']:.3f}; a copying head reduces the "
        f"loss of {about['base']:.3f} nats per token by {about['gain']:.3f} "
        f"({about['even']:.3f} if it attends evenly)"
    )
    print(
        f"{', '.join(strength)} in {options.out}, with the report beside it; "
        f"{about['seconds']:.0f} s, {about['rss_bytes'] / 1e9:.1f} GB"
    )


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): name another file with --out") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. The exit status is 2, with one line of error, if the user can fix it."""
    words = [
        re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), x)
        for x in (sys.argv[1:] if argv is None else argv)
    ]
    options = command_line().parse_args(words)
    try:
        if options.generator == "hand":
            write_by_hand(options)
        elif options.env:
            at = next(n for n, x in enumerate(words) if x.partition("=")[0] == "--env")
            named = words[at] == "--env" and [*map(Path, words[at + 1 : at + 2])] == [options.env]
            taken = 2 if named else 1
            return run_in(options.env, words[:at] + words[at + taken :])
        else:
            generate(options)
    except Exception as e:
        if type(e).__name__ not in ("UserError", "TooLittle"):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
