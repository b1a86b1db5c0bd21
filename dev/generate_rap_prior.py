# /// script
# requires-python = ">=3.11"
# dependencies = ["cutlass[plots]==0.9.0", "numpy>=2.0", "safetensors>=0.5"]
# ///
"""
Token shards of a run -> an attention prior (rap_prior.safetensors) and a report of what it says. It runs in an environment of its own, as
`cutlass`, the rectified LASSO that finds the rules, bears the name of a package of NVIDIA's that torch imports:

    python dev/generate_rap_prior.py --env ~/.cache/nanochat/rap_env          makes that environment first, or finds it
    uv run dev/generate_rap_prior.py                                          the same, where uv is installed

A pair (i, j) of positions is useful when the token at j is the next one, x[i + 1]. Pairs are sampled in documents of the training split;
`rules` fits which of their features make them useful (positive class: not useful, so that rare matches lie outside its critical ranges)
and turns the coefficients into terms of B; `rectified` takes the difference of the co-activations of rectified token features between
useful and other pairs; `correlation` takes the same of the raw features and needs no cutlass. The terms are those of nanochat/prior.py.

It reads token shards of format 1 by itself and imports neither nanochat nor torch. It refuses the validation split, tokens of another
tokenizer, and a `cutlass` that is not version 0.9.0 of the LASSO package. The tensors depend on the tokens, the options and the seed alone.
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
SHARD_FORMAT = 1  # of nanochat/tokens.py
CUTLASS = "0.9.0"
LEAST = 20_000  # tokens: fewer show no rule
GENERATORS = "rules", "rectified", "correlation"
GROUPS = "lag", "key", "match", "pair"


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, with the value, and what to do."""


def options() -> argparse.ArgumentParser:
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    about = (__doc__ or "").split("\n\n")[0]
    p = argparse.ArgumentParser(
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument
    add("--generator", choices=GENERATORS, default="rules", help="how the prior is computed")
    add("--tokenizer", type=Path, default=base / "tokenizer", help="folder of the tokenizer")
    add(
        "--tokens",
        type=Path,
        default=base / "tokens",
        help="folder of the token shards, where base_train leaves them",
    )
    add(
        "--out",
        type=Path,
        default=base / "rap" / "rap_prior.safetensors",
        help="the artifact; the report lies beside it, as .html",
    )
    add(
        "--mix",
        nargs="+",
        default=[],
        metavar="NAME:WEIGHT",
        help="sources and their shares, as the run has them; else all, by size",
    )
    add("--max_tokens", type=int, default=20_000_000, help="tokens to read at most")
    add("--pairs", type=int, default=20_000, help="pairs to fit on, half of them useful")
    add(
        "--others",
        choices=("random", "matched"),
        default="random",
        help="matched: with the distances and frequencies of useful pairs",
    )
    add("--max_lag", type=int, default=1024, help="how far back a key may lie")
    add("--band", type=int, default=0, help="from this distance on lag is 0; 0 = max_lag")
    add(
        "--features",
        nargs="+",
        metavar="NAME",
        help="the features that rules may use, as rap_terms.py lists them; else all",
    )
    add(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        help="the terms that the artifact may hold",
    )
    add(
        "--codes",
        choices=("next", "around", "hash"),
        default="next",
        help="a token's code: what follows it, what is around it, or random",
    )
    add("--code_bits", type=int, default=32, help="bits of a token's code, the rank of match")
    add(
        "--pair_bits", type=int, default=32, help="bits of the code of two tokens, the rank of pair"
    )
    add(
        "--spans",
        type=int,
        default=4,
        help="spans of distances that one head each looks at, at most; they come with lag",
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
        help="this share of the weakest entries of each term becomes 0",
    )
    add("--seed", type=int, default=0, help="of every random choice")
    add(
        "--env",
        type=Path,
        nargs="?",
        const=base / "rap_env",
        help="run in the environment of this folder, made if it is not there",
    )
    return p


# ----------------------------------------------------------------------------------------------------
# Reading


class Vocabulary(NamedTuple):
    tokens: list[bytes]  # special ones are empty
    fingerprint: str


def read_tokenizer(folder: Path) -> Vocabulary:
    """The bytes of every token. UserError where there is no tokenizer, or a damaged one."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"there is no tokenizer in {folder}: train one with python -m scripts.tok_train, or name another with --tokenizer"
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
            f"the tokenizer in {folder} is damaged ({type(e).__name__}): train one with python -m scripts.tok_train"
        ) from e


def kinds(tokens: list[bytes]) -> dict[str, Any]:
    """What tokens look like: (V,) bool of each kind."""
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
    """The training shards of text made with this tokenizer, by source. UserError says why there is none."""
    found: dict[str, list] = {}
    validation = others = 0
    for path in sorted(folder.glob("*/meta.json")):
        m = re.fullmatch(r"(.+)-(train|val)-[0-9a-f]{16}", path.parent.name)
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if not m or meta["mask"]:
                continue  # conversations
            if meta["format"] != SHARD_FORMAT:
                raise UserError(
                    f"the token shard {path.parent} has format {meta['format']}, this generator reads {SHARD_FORMAT}"
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
                found.setdefault(m[1], []).append((path.parent, meta))
        except (OSError, ValueError, KeyError) as e:
            raise UserError(
                f"the token shard {path.parent} is damaged ({type(e).__name__}): delete it and train again"
            ) from e
    if not found:
        why = (
            "only validation shards, which no prior may see"
            if validation
            else "no training shards of text"
        )
        why += f" ({others} shards are of another tokenizer)" if others and not validation else ""
        raise UserError(
            f"{folder} holds {why}: let base_train tokenise the data first, or name the folder with --tokens"
        )
    return found


def parse_mix(mix: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """NAME:WEIGHT -> shares that sum to 1; {} for no mix. A weight alone must be positive, a name known."""
    shares = {}
    for item in mix:
        m = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", item)
        if not m or float(m[2]) <= 0:
            raise UserError(
                f"--mix {item} is no NAME:WEIGHT with a weight above 0: write it as in {next(iter(names))}:0.5"
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
    Random documents of each source up to its share of `limit` tokens: (to fit on, held out: a twentieth). A source that has less is
    repeated, as training does, but never into what is held out.
    """
    import numpy as np

    sizes = {name: sum(meta["tokens"] for _, meta in found) for name, found in shards.items()}
    if (total := sum(sizes[name] for name in shares or sizes)) < LEAST:
        raise UserError(
            f"the training split holds {total:,} tokens, too few to show a rule: at least {LEAST:,} are needed"
        )
    if not shares:
        shares, limit = (
            {name: size / total for name, size in sizes.items() if size},
            min(limit, total),
        )
    fit, held = [], []
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
                f"the training split of {name} has fewer than two documents: give it more, or leave it out of --mix"
            )
        order, wanted = rng.permutation(len(documents)), limit * share
        at = got = 0
        while got < min(wanted, sizes[name]) / 20 and at < len(order) - 1:
            held.append(documents[order[at]])
            got += len(held[-1])
            at += 1
        rest = order[at:]
        lengths = np.cumsum([len(documents[k]) for k in rest])
        times, left = divmod(wanted - got, int(lengths[-1]))
        for n in [len(rest)] * int(times) + [int(np.searchsorted(lengths, left))]:
            fit += [documents[k] for k in rest[:n]]
    return joined(fit, rng), joined(held, rng)


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
    """The LASSO package `cutlass` of the version that this file was written for. UserError for none, another, or NVIDIA's."""
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
            f"the cutlass here ({where}) is NVIDIA's or another's, not the rectified LASSO {CUTLASS}: {remedy}"
        ) from None
    if version != CUTLASS:
        raise UserError(
            f"cutlass is installed in version {version}, and this generator was written for {CUTLASS}: {remedy}"
        )
    cutlass = import_module("cutlass")
    if not hasattr(cutlass, "CutlassClassifier"):
        raise UserError(
            f"NVIDIA's cutlass ({cutlass.__file__}) hides the rectified LASSO {CUTLASS} here: {remedy}"
        )
    return cutlass


# ----------------------------------------------------------------------------------------------------
# The whole of it


def run_in(folder: Path, argv: Sequence[str]) -> int:
    """Run this file in the environment of a folder, which is made with what the head of this file asks for; its exit status."""
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
        print(f"making an environment in {folder} with {', '.join(needs)}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as e:
            raise UserError(
                f"cannot make an environment in {folder} ({e}): name another folder with --env, or use uv run"
            ) from e
        pip = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *needs], capture_output=True, text=True
        )
        if pip.returncode:
            last = (pip.stderr.strip() or "no word why").splitlines()[-1]
            raise UserError(
                f"pip could not install {', '.join(needs)} ({last}): mend that and run again"
            )
        done.write_text(json.dumps(needs))
    return subprocess.run([python, __file__, *argv]).returncode


def peak_bytes() -> int:
    """The most memory that this process has held."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def check(a: argparse.Namespace) -> None:
    """UserError for an option outside its range."""
    limits = {
        "code_bits": (2, 256),
        "pair_bits": (2, 256),
        "max_lag": (16, 65536),
        "spans": (0, 64),
    }
    limits |= {"pairs": (200, 10**6), "sparsity": (0, 0.999)}
    for name, (low, high) in limits.items():
        if not low <= getattr(a, name) <= high:
            raise UserError(
                f"--{name} {getattr(a, name)} is out of range: give {low:g} to {high:g}"
            )


def generate(a: argparse.Namespace) -> None:
    """Read, sample, fit, measure, write."""
    began = time.monotonic()
    check(a)
    cutlass = None if a.generator == "correlation" else load_cutlass()
    vocabulary = read_tokenizer(a.tokenizer)
    shards = find_shards(a.tokens, vocabulary.fingerprint)
    import numpy as np
    import rap_terms as rt
    from rap_report import report
    from rap_worth import measure
    from safetensors.numpy import save

    if odd := sorted(set(a.features or ()) - set(rt.FEATURES)):
        raise UserError(f"--features {odd[0]} is no feature: choose from {', '.join(rt.FEATURES)}")
    V, rng = len(vocabulary.tokens), np.random.default_rng(a.seed)
    text, held = read_text(shards, parse_mix(a.mix, list(shards)), a.max_tokens, rng)
    print(
        f"read {len(text.ids):,} tokens of {', '.join(shards)}; {len(held.ids):,} more are held out",
        flush=True,
    )
    e = rt.embed(text.ids, V, a.code_bits, "next" if a.codes == "hash" else a.codes)
    sizes = (text, a.pairs), (held, min(a.pairs, 10_000))
    pairs, unseen = (rt.sample_pairs(t, n, a.max_lag, rng, a.others == "matched") for t, n in sizes)
    curves = {
        "lag": rt.lag_curve(text.ids, a.max_lag, a.lag_from),
        "key": rt.key_worth(text, V, a.max_lag),
    }
    codes, ranges = rng.choice(np.array([-1, 1], np.int8), (V, a.code_bits)), {}
    if cutlass and a.codes != "hash":
        rectified, ranges = rt.rectified_codes(cutlass, e, text, pairs)
        codes[:, : -(a.code_bits // 4)] = rectified[
            :, : -(a.code_bits // 4)
        ]  # the rest stays random: tokens of one kind differ
    bits = np.arange(
        a.pair_bits
    )  # the code of two tokens: each bit of the one times a different bit of the other
    pair_codes = (
        codes[:, (bits + 1 + 7 * (bits // a.code_bits)) % a.code_bits],
        codes[:, bits % a.code_bits],
    )
    rules, about = [], {}
    print(f"fitting: {a.generator}", flush=True)
    if a.generator == "rules":
        share, kind = (
            (np.bincount(text.ids, minlength=V) + 0.5) / len(text.ids),
            kinds(vocabulary.tokens),
        )
        raw = rt.columns(text, pairs, a.features or list(rt.FEATURES), share, kind, e)
        rules, about = rt.fit_rules(cutlass, raw, pairs.useful, a.seed)
        terms = rt.rules_terms(rules, raw, curves, text.ids, pairs, a.code_bits, a.pair_bits)
        ranges |= {f"{r.feature} {n}": [r.low, r.high] for n, r in enumerate(rules)}
    elif a.generator == "rectified":
        terms = curves | rt.difference_terms(text.ids, pairs, codes.astype(np.float64), pair_codes)
    else:
        codes, whole = rt.spell(e)
        terms = curves | rt.difference_terms(text.ids, pairs, codes @ whole.T, ())
        terms["match"] = whole.T @ terms["match"] @ whole
    terms |= {"codes": codes, "pair_query": pair_codes[0], "pair_now": pair_codes[1]}
    if spans := rt.find_spans(text.ids, a.max_lag, a.spans):
        distance = np.arange(len(terms["lag"] if "lag" in terms else curves["lag"]))
        terms["spans"] = np.stack(
            [(low <= distance) & (distance <= high) for low, high, _ in spans]
        )
    about["spans"] = spans
    terms, strength = rt.finish(terms, a, text.ids, pairs)
    print("measuring on held-out text", flush=True)
    about |= measure(terms, strength, text, held, unseen, V, min(512, a.max_lag))
    about |= {
        "pairs": a.pairs,
        "tokens": len(text.ids),
        "seconds": round(time.monotonic() - began, 1),
        "rss_bytes": peak_bytes(),
    }
    said = [f"+{2 * abs(r.weight):.2f}: {r.words()}" for r in rules if 2 * abs(r.weight) >= 0.005]
    said += [about["polished"]] if rules else []
    numbers = ("auc", "youden", "fit", "gain", "seconds", "rss_bytes", "pairs", "tokens")
    split = "".join(sorted(m["sha256"] for found in shards.values() for _, m in found))
    meta = {
        "format": "rap-1",
        "generator": a.generator,
        "generator_version": VERSION,
        "cutlass": CUTLASS if cutlass else "none",
        "tokenizer": vocabulary.fingerprint,
        "split": hashlib.sha256(split.encode()).hexdigest(),
        "rules": json.dumps(said),
        "ranges": json.dumps(ranges),
        "sparsity": json.dumps(a.sparsity),
        "strength": json.dumps(strength),
        "report": json.dumps({k: about[k] for k in numbers if k in about}),
        "gates": json.dumps(about["gates"]),
        "spans": json.dumps(spans),
        "options": json.dumps({k: v for k, v in vars(a).items() if not isinstance(v, Path)}),
    }
    write(a.out, save(terms, meta))
    write(
        a.out.with_suffix(".html"),
        report(a, terms, rules, about, strength, held, vocabulary.tokens).encode(),
    )
    if "spans" in terms:
        print(
            "  a head each looks at the distances "
            + ", ".join(f"{low} to {high}" if high > low else str(low) for low, high, _ in spans)
        )
    print(
        "".join(f"  {line}\n" for line in said)
        + f"AUC {about['auc']:.3f}, Youden's J {about['youden']:.3f}; a copying head takes "
        f"{about['gain']:.3f} nats off {about['base']:.3f} ({about['even']:.3f} when it attends evenly)"
    )
    print(
        f"{', '.join(strength)} in {a.out}, the report beside it; {about['seconds']:.0f} s, {about['rss_bytes'] / 1e9:.1f} GB"
    )


def write(path: Path, data: bytes) -> None:
    """Beside and renamed: whole or absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): name another file with --out") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status: 2 with one line on standard error for what the user can mend."""
    words = [
        re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), x)
        for x in (sys.argv[1:] if argv is None else argv)
    ]
    a = options().parse_args(words)
    try:
        if a.env:
            at = next(n for n, x in enumerate(words) if x.partition("=")[0] == "--env")
            taken = 2 if words[at] == "--env" and words[at + 1 : at + 2] == [str(a.env)] else 1
            return run_in(a.env, words[:at] + words[at + taken :])
        generate(a)
    except Exception as e:
        if type(e).__name__ not in ("UserError", "TooLittle"):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
