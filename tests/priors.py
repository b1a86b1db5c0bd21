"""Attention priors for tests: random artifacts, B by its formulas, models that carry one."""

from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from nanochat.model import prior_artifact
from nanochat.model.config import AttentionPriorKnobs
from nanochat.model.gpt import GPT

V, C = 61, 16  # tiny's vocabulary and context
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PRINT = "f" * 64
ORDER = ("key", "match", "pair", "lag")  # of the gates


def terms(seed=0, vocab=V, reach=C, P=8, P2=6):
    """A random artifact with every group."""
    g = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return (torch.randint(0, 2, shape, generator=g) * 2 - 1).to(torch.int8)

    lag = torch.exp(-torch.arange(reach) / 4) + 0.1 * torch.randn(reach, generator=g)
    match = torch.stack(
        [0.02 * torch.randn(P, P, generator=g), torch.eye(P) / P, torch.zeros(P, P)]
    )
    pair = torch.rand(P2, generator=g) / P2
    pair[1] = 0  # some generators leave columns unused
    out = {
        "lag": lag,
        "key": torch.randn(vocab, generator=g),
        "codes": signs(vocab, P),
        "match": match,
    }
    return out | {"pair_query": signs(vocab, P2), "pair_now": signs(vocab, P2), "pair": pair}


def with_spans(reach=C, seed=0, **more):
    """The same and spans for three heads."""
    return {
        **terms(seed, reach=reach, **more),
        "spans": torch.rand(3, reach, generator=torch.Generator().manual_seed(seed)),
    }


def write(path: Path, tensors, **about) -> str:
    meta = {"format": "rap-1", "generator": "rules", "tokenizer": PRINT, **about}
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        path,
        metadata={n: v for n, v in meta.items() if v},
    )
    return str(path)


def brute(tensors, x, i, j):
    """B_g[i, j] of every group by the formulas of the artifact, for one row of tokens x."""

    def at(name, position):
        return (
            tensors[name][x[position]].double()
            if position >= 0
            else torch.zeros(tensors[name].size(1), dtype=torch.float64)
        )

    out = {}
    if "lag" in tensors:
        out["lag"] = float(tensors["lag"][i - j]) if i - j < tensors["lag"].numel() else 0.0
    if "bias" in tensors:
        out["bias"] = float(tensors["bias"][i, j])
    if "key" in tensors:
        out["key"] = float(tensors["key"][x[j]])
    if "match" in tensors:
        out["match"] = sum(
            float(at("codes", i) @ m.double() @ at("codes", j - s))
            for s, m in enumerate(tensors["match"])
        )
    if "pair" in tensors:
        mine, theirs = (
            at("pair_query", i - 1) * at("pair_now", i),
            at("pair_query", j - 2) * at("pair_now", j - 1),
        )
        out["pair"] = float((tensors["pair"].double() * mine * theirs).sum())
    return out


def matrices(tensors, idx):
    """{group: (B, T, T)} by three loops; 0 where j > i."""
    B, T = idx.shape
    out = {}
    for b in range(B):
        for i in range(T):
            for j in range(i + 1):
                for name, value in brute(tensors, idx[b].tolist(), i, j).items():
                    out.setdefault(name, torch.zeros(B, T, T, dtype=torch.float64))[b, i, j] = value
    return out


def whole(tensors, idx):
    """The same at once, for longer rows of a full artifact."""
    T = idx.size(1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]

    def at(name, s):
        x = tensors[name].double()[idx]
        return torch.cat((torch.zeros_like(x[:, :s]), x[:, : T - s]), 1)

    out = {
        "lag": torch.nn.functional.pad(tensors["lag"], (0, T))
        .double()[(i - j).clamp(min=0)]
        .expand(len(idx), -1, -1)
    }
    out["key"] = tensors["key"].double()[idx][:, None].expand(-1, T, -1)
    out["match"] = sum(
        at("codes", 0) @ m.double() @ at("codes", s).mT for s, m in enumerate(tensors["match"])
    )
    mine, theirs = at("pair_query", 1) * at("pair_now", 0), at("pair_query", 2) * at("pair_now", 1)
    out["pair"] = (mine * tensors["pair"].double()) @ theirs.mT
    return {name: B.tril() for name, B in out.items()}


def made(path, device=CPU, config=None, **knobs):
    """(config with the prior, its tensors)."""
    config = config or tiny.config()
    config.rap, tensors = prior_artifact.prepare(
        AttentionPriorKnobs(rap=path, **knobs), config, PRINT, device
    )
    return config, tensors


def model_with(path, seed=3, device=CPU, shape=None, **knobs):
    """A random tiny model with a prior, gates of different sizes."""
    config, tensors = made(
        path, device, tiny.config(**(shape or {})), **{"rap_alpha": 1.0, **knobs}
    )
    m = tiny.randomise(GPT.build(config), seed)
    m.prior.load_state_dict(tensors)
    with torch.no_grad():
        m.prior.gates += 0.5 * torch.randn(
            m.prior.gates.shape, generator=torch.Generator().manual_seed(seed)
        )
    return m


def tokens(B=2, T=C, seed=5, few=9):
    """Few different ones, so that tokens and pairs come again."""
    return torch.randint(0, few, (B, T), generator=torch.Generator().manual_seed(seed))
