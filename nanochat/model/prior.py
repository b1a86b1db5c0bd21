"""
The attention prior (RAP): reads an artifact of dev/generate_rap_prior.py, checks it, and looks its terms up for the tokens of a pass.

A prior adds to the scores of layer l and head h, between query i and key j, the sum over its groups g of gates[l, h, g] * B_g[i, j]:
    lag    lag[i - j]: how useful a token is at a distance; in some heads spans[n, i - j] instead; or bias[i, j], any matrix of positions
    key    key[x_j]: tokens worth looking at whatever the query
    match  sum_s codes[x_i] . match[s] codes[x_(j-s)], codes of -1 and 1: s = 1 is the copy rule
    pair   the same for two tokens: sum_p pair[p] (a[x_(i-1)] b[x_i])[p] (a[x_(j-2)] b[x_(j-1)])[p] with the codes a, b
A token before the first counts 0. To start with, one head of each layer leads with match, one with pair, and one with each span (where
heads are fewer, the next layer goes on): heads that all began alike would have to part first. `Prior` lives in the model and its tables
are buffers, so a checkpoint needs no artifact. All of this is defined at absolute positions and looks across documents as attention does.
It refuses a prior of another tokenizer and whatever would run code; it knows no model. attention.py does the adding.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochat.base.common import UserError, notice
from nanochat.base.files import sha256_file
from nanochat.model.attention import Bias, flex_blocks, flex_missing
from nanochat.model.cache import KVCache
from nanochat.model.config import AttentionPriorKnobs

FORMAT = "rap-1"
GROUPS = {  # the tensors of each with the names of their sizes
    "lag": {"lag": "T"},
    "spans": {"spans": "NT"},
    "bias": {"bias": "LL"},
    "key": {"key": "V"},
    "match": {"codes": "VP", "match": "SPP"},
    "pair": {"pair_query": "VQ", "pair_now": "VQ", "pair": "Q"},
}
CODES = ("codes", "pair_query", "pair_now")
PLACE_COLUMNS = 64  # at most, where a kernel can take positions only as columns of q and k


# ----------------------------------------------------------------------------------------------------
# The artifact


def load(path: str, vocab_size: int, fingerprint: str) -> tuple[dict[str, Tensor], str]:
    """The checked tensors of an artifact and a word on where they are from. UserError says what is wrong with it."""
    try:
        if path.endswith(".pt"):
            matrix = torch.load(path, map_location="cpu", weights_only=True)
            tensors, about = {"bias": matrix}, {}
        else:
            with safe_open(path, framework="pt") as f:
                tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            f"there is no prior {path}: make one with dev/generate_rap_prior.py"
        ) from None
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"cannot read the prior {path} ({e}): make it again with dev/generate_rap_prior.py"
        ) from e
    except Exception as e:  # torch.load names what is wrong with a pickle in many ways
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{path} is no plain tensor and is not loaded, as it might run code ({said}): save one 2-D tensor"
        ) from e
    if "format" not in about and len(tensors) == 1:  # somebody's own matrix
        tensors = {"bias": next(iter(tensors.values()))}
    elif about.get("format") != FORMAT:
        raise UserError(
            f"the prior {path} has format {about.get('format')!r}, this version reads {FORMAT!r}: generate it again"
        )
    if about.get("tokenizer", fingerprint) != fingerprint or (
        "tokenizer" not in about and set(tensors) - {"lag", "bias"}
    ):
        raise UserError(
            f"the prior {path} was computed with tokenizer {about.get('tokenizer', 'unknown')[:12]}, this run's is {fingerprint[:12]}: "
            "generate it again with this tokenizer, from token shards made with it"
        )
    _check(tensors, path, vocab_size)
    if "format" not in about:
        top = tensors["bias"].float().tril().abs().max()
        tensors["bias"] = tensors["bias"].float() / (top if top > 0 else 1.0)
    return tensors, f"{about.get('generator', 'matrix')} {sha256_file(path)[:8]}"


def _check(tensors: dict[str, Tensor], path: str, vocab_size: int) -> None:
    """UserError unless the tensors are those of whole groups, of fitting shapes, finite, and their codes -1 and 1."""
    size = {"V": vocab_size}  # the other letters stand for the first number that they meet
    wrong = ""
    for name, t in tensors.items():
        group = next((g for g in GROUPS.values() if name in g), {})
        shape = tuple(t.shape) if isinstance(t, Tensor) else ()
        if not group or not shape:
            wrong = (
                f"holds {name}, which is no term of a prior"
                if shape
                else "holds no tensor where one should be"
            )
        elif missing := group.keys() - tensors.keys():
            wrong = f"holds {name} without {', '.join(sorted(missing))}"
        elif len(shape) != len(group[name]) or any(
            size.setdefault(c, n) != n or n == 0 for c, n in zip(group[name], shape, strict=True)
        ):
            wrong = f"has {name} of shape {shape}, not {', '.join(f'{c} = {size[c]:,}' if c in size else c for c in group[name])}"
        elif not t.isfinite().all():
            wrong = f"has values in {name} that are not finite"
        elif (
            (t.dtype != torch.int8 or (t.abs() != 1).any())
            if name in CODES
            else not t.is_floating_point()
        ):
            wrong = (
                f"has {name} as {t.dtype}, not {'-1 and 1 as int8' if name in CODES else 'float32'}"
            )
    if not wrong and "spans" in tensors and "lag" not in tensors:
        wrong = "holds spans without lag"
    if wrong or not tensors or ("bias" in tensors and len(tensors) > 1):
        wrong = wrong or "holds bias together with other terms, or nothing"
        raise UserError(
            f"the prior {path} {wrong}: generate it again with dev/generate_rap_prior.py"
        )


# ----------------------------------------------------------------------------------------------------
# Factors


def factor_lag(
    lag: Tensor, error: float, most: int = PLACE_COLUMNS
) -> tuple[Tensor, Tensor, float]:
    """
    u, w (C, r) with u[i] . w[j] close to lag[i - j] for all i >= j, and the largest error: the first r <= most that meets `error`. lag (C,)
    becomes a constant and waves a cos + b sin, bounded at every distance and free beyond the diagonal: frequencies by matching
    pursuit on the residual's spectrum, amplitudes by least squares. Sharp curves need many: a wave cannot stay low after a narrow peak.
    """
    C, lag = lag.numel(), lag.double()
    d = torch.arange(C, dtype=torch.float64)
    freq, columns = [], [torch.ones(C, dtype=torch.float64)]
    while True:
        A = torch.stack(columns, 1)
        amplitude = torch.linalg.lstsq(A, lag[:, None], driver="gelsd").solution[:, 0]
        residual = lag - A @ amplitude
        worst = float(residual.abs().max())
        if worst <= error or len(columns) + 2 > min(most, C):
            break
        freq.append(
            float(torch.fft.rfft(residual, 8 * C)[1:].abs().argmax() + 1) * torch.pi / (4 * C)
        )
        columns += [torch.cos(freq[-1] * d), torch.sin(freq[-1] * d)]
    u, w = [columns[0]], [columns[0] * amplitude[0]]
    for n, (a, b) in enumerate(amplitude[1:].view(-1, 2)):  # a cos(f (i - j)) + b sin(f (i - j))
        cos, sin = columns[1 + 2 * n], columns[2 + 2 * n]
        u += [cos, sin]
        w += [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(u, 1).float(), torch.stack(w, 1).float(), worst


def factor_matrix(
    matrix: Tensor, error: float, most: int = PLACE_COLUMNS
) -> tuple[Tensor, Tensor, float]:
    """u, w (C, r) with u w^T close to the matrix (C, C) where i >= j, and the largest error; a truncated singular value decomposition."""
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, w = U * S.sqrt(), V.mT * S.sqrt()
    r, worst = 0, torch.inf
    while worst > error and r < min(most, S.numel()):
        r += 1
        worst = float((matrix.double() - u[:, :r] @ w[:, :r].mT).tril().abs().max())
    return u[:, :r].float(), w[:, :r].float(), worst


def factor_match(
    codes: Tensor, match: Tensor, error: float
) -> tuple[list[int], Tensor, Tensor, float]:
    """
    The shifts s with a match, query (P, r), keys (shifts, P, r) with sum_s a . match[s] b_s = (a query) . sum_s b_s keys[s], and the
    largest error between tokens (of a sample of 512): an SVD of match with its shifts side by side; r is the smallest that meets `error`.
    """
    shifts = [s for s in range(match.size(0)) if match[s].any()] or [0]
    wide = match[shifts].double()  # (S', P, P)
    S, P, _ = wide.shape
    U, values, V = torch.linalg.svd(wide.permute(1, 0, 2).reshape(P, S * P), full_matrices=False)
    query, keys = U * values.sqrt(), (V.mT * values.sqrt()).view(S, P, -1)
    some = codes[torch.linspace(0, codes.size(0) - 1, min(512, codes.size(0))).long()].double()
    r, worst = 0, torch.inf
    while worst > error and r < P:
        r += 1
        worst = float(
            (some @ (wide - query[:, :r] @ keys[:, :, :r].mT) @ some.T).abs().amax((1, 2)).sum()
        )
    return shifts, query[:, :r].float(), keys[:, :, :r].float(), worst


def prepare(
    k: AttentionPriorKnobs,
    config: Any,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    The prior that the knobs name, for a model of `config`: what its field `rap` holds, and the tensors of Prior. Positions stay exact
    where kernels look them up (a CPU's, flex, dense); else they become their fit for good: whatever reads the checkpoint adds the same.
    """
    found, about = load(k.rap, config.vocab_size, fingerprint)
    heads = round(k.rap_heads * config.n_head) if k.rap_heads <= 1 else int(k.rap_heads)
    if not 0 < heads <= config.n_head or (k.rap_heads > 1 and heads != k.rap_heads):
        raise UserError(
            f"--rap_heads={k.rap_heads:g} of {config.n_head} heads is none, or more than there are: give a share or a number"
        )
    if k.rap_layers > config.n_layer:
        raise UserError(
            f"--rap_layers={k.rap_layers} is more than the model's {config.n_layer} layers: leave it out for all"
        )
    tensors = {
        name: F.pad(t, (0, 0, 0, 1)) if name in CODES else t.float() for name, t in found.items()
    }  # a row of 0 for no token
    C, columns, errors, shifts = (
        config.sequence_len,
        [],
        {},
        [],
    )  # columns: [group, its columns of u and w], by gate
    if "key" in found:
        columns.append(["key", 1])
    if "match" in found:
        shifts, tensors["query"], tensors["keys"], errors["match"] = factor_match(
            found["codes"], tensors.pop("match"), k.rap_error
        )
        columns.append(["match", tensors["query"].size(1)])
    if "pair" in found:
        used = found["pair"].nonzero()[:, 0]
        tensors |= {name: tensors[name][..., used] for name in GROUPS["pair"]}
        columns.append(["pair", len(used)])
    width = config.head_dim + sum(n for _, n in columns)
    attention = "factored" if k.attention == "auto" else k.attention
    spans = (
        F.pad(tensors.pop("spans")[:, :C], (0, max(0, C - found["spans"].size(1)) + 1))
        if "spans" in found
        else torch.zeros(0, C + 1)
    )
    if (
        len(spans) and device.type != "cpu" and attention == "factored"
    ):  # a span is too sharp for a few columns
        if k.attention == "factored":
            raise UserError(
                "--attention=factored cannot add the spans of this prior on a GPU: leave it out, or generate it with --spans 0"
            )
        attention = "dense" if flex_missing(device, dtype, width) else "flex"
    if attention == "flex" and (missing := flex_missing(device, dtype, width)):
        attention = "dense" if len(spans) and device.type != "cpu" else "factored"
        notice(f"{missing}: the prior is added in the {attention} form")
    for name in found.keys() & {
        "lag",
        "bias",
    }:  # one distance more, for all beyond; a matrix is 0 where it does not reach
        given = tensors.pop(name)[:C] if name == "lag" else tensors.pop(name)[:C, :C]
        place = F.pad(given, (0, C + 1 - len(given)) if name == "lag" else (0, C - len(given)) * 2)
        columns.append([name, 0])
        if device.type != "cpu" and attention == "factored":
            u, w, error = (
                factor_lag(place[:C], k.rap_error)
                if name == "lag"
                else factor_matrix(place, k.rap_error)
            )
            if error > k.rap_error and name == "bias" and k.attention == "auto":
                attention = "dense"
            else:
                if error > k.rap_error:
                    notice(
                        f"{name} as {u.size(1)} columns has the error {error:.2g}, above --rap_error: --attention=flex adds it exactly"
                    )
                tensors |= {"place_u": u, "place_w": w}
                place = F.pad(w[0] @ u.mT, (0, 1)) if name == "lag" else u @ w.mT
                columns[-1][1], errors[name] = u.size(1), error
        tensors["place"] = torch.cat((place[None], spans)) if len(spans) else place
    rank = sum(n for _, n in columns)
    if device.type != "cpu" and config.head_dim + rank > 256:
        raise UserError(
            f"the prior {k.rap} has rank {rank}, which beside heads of {config.head_dim} is wider than the 256 that kernels take: "
            "raise --rap_error, or generate it with fewer codes"
        )
    layers = k.rap_layers or config.n_layer
    leads = [
        (g, 0)
        for name in ("match", "pair")
        for g, (column, _) in enumerate(columns)
        if column == name
    ]
    leads += [(len(columns) - 1, n + 1) for n in range(len(spans))] or [
        (g, 0) for g, (name, _) in enumerate(columns) if name == "lag"
    ]
    tensors["gates"] = torch.full((layers, heads, len(columns)), k.rap_alpha)
    rows = [
        [0] * heads for _ in range(layers)
    ]  # of place, where it has spans: the curve that a head has
    for layer, head, n in deal(len(leads), layers, heads):
        group, rows[layer][head] = leads[n]
        tensors["gates"][layer, head, group] = k.rap_lead or k.rap_alpha
    words = [
        f"{name} rank {n}" + (f" (error {errors[name]:.2g})" if name in errors else "")
        if n
        else name
        for name, n in columns
    ]
    spec = {
        "attention": attention,
        "columns": columns,
        "shifts": shifts,
        "learned": k.rap_gate == "learned",
        "rows": rows if len(spans) else [],
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()
        },
        "about": f"{about}: {', '.join(words)}" + (f", {len(spans)} spans" if len(spans) else ""),
    }
    if k.rap_gate == "annealed":
        tensors["start"] = tensors["gates"].clone()
        spec["tensors"]["start"] = spec["tensors"]["gates"]
    return spec, tensors


def deal(items: int, layers: int, heads: int) -> list[tuple[int, int, int]]:
    """(layer, head, item) for every head that leads: each layer deals all items out from its first head on, or as many as it has heads."""
    if heads >= items:
        return [(layer, n, n) for layer in range(layers) for n in range(items)]
    return [
        (layer, head, (layer * heads + head) % items)
        for layer in range(layers)
        for head in range(heads)
    ]


# ----------------------------------------------------------------------------------------------------
# In the model


class Prior(nn.Module):
    """
    The tables and gates that a spec of `prepare` describes. gates (layers, heads, groups) are parameters where they are learned;
    everything else are buffers. Where `annealed` is set, `at` takes the gates from their start to 0.
    """

    def __init__(self, spec: dict[str, Any], windows: list[int], head_dim: int):
        super().__init__()
        self.spec, self.windows, self.head_dim = spec, windows, head_dim
        self.annealed = False
        for name, (dtype, *shape) in spec["tensors"].items():
            t = torch.empty(shape, dtype=getattr(torch, dtype))
            if name == "gates" and spec["learned"]:
                self.gates = nn.Parameter(t)
            else:
                self.register_buffer(name, t)
        codes = spec["tensors"].get("codes") or spec["tensors"].get("pair_now")
        self.blank = codes[1] - 1 if codes else 0  # the token before the first
        self.memory = max(
            [*spec["shifts"], 2 if "pair" in spec["tensors"] else 0]
        )  # tokens before a pass that it looks back to
        self.layers, self.heads = spec["tensors"]["gates"][1:3]
        self.rank = sum(n for _, n in spec["columns"])
        self._backend = ""

    def describe(self) -> str:
        kind = "learned" if self.spec["learned"] else "annealed" if self.annealed else "fixed"
        return f"{self.spec['about']}; {self.heads} heads of {self.layers} layers, gates {kind}, {self.spec['attention']}"

    @torch.no_grad()
    def at(self, progress: float) -> None:
        """Follow the run's progress 0..1: annealed gates fall with it."""
        if self.annealed:
            self.gates.copy_(self.get_buffer("start") * (1 - progress))

    def forward(
        self,
        idx: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> list[Bias | None]:
        """What the prior adds in each layer for tokens idx (B, T), which continue what the cache holds; looked up once for all layers."""
        t, (B, T), m = dict(self.named_buffers()), idx.shape, self.memory
        tail = (
            idx.new_full((B, m), self.blank)
            if cache is None or cache.tail.size(1) != m
            else cache.tail
        )
        seen = torch.cat((tail, idx), 1)
        self._backend = self._backend or self._choose(t, idx.device, dtype)
        place = t.get("place") if self._looks_up(idx.device) else None
        nothing = self.gates.new_zeros(1)
        u, w, gates = (
            [idx.new_zeros(B, T, 0, dtype=dtype)],
            [idx.new_zeros(B, T, 0, dtype=dtype)],
            [self.gates[..., :0]],
        )

        def before(s: int) -> Tensor:
            return seen[:, m - s : m - s + T]

        for g, (name, _) in enumerate(self.spec["columns"]):
            if name == "key":
                w.append(t["key"][idx][..., None])
                u.append(torch.ones_like(w[-1]))
            elif name == "match":
                u.append(t["codes"][idx].to(t["query"].dtype) @ t["query"])
                parts = [
                    t["codes"][before(s)].to(k.dtype) @ k
                    for s, k in zip(self.spec["shifts"], t["keys"], strict=True)
                ]
                w.append(sum(parts[1:], parts[0]))
            elif name == "pair":
                u.append(t["pair_query"][before(1)] * t["pair_now"][idx] * t["pair"])
                w.append(t["pair_query"][before(2)] * t["pair_now"][before(1)])
            elif place is None:
                at = torch.arange(T, device=idx.device)[None] if positions is None else positions
                u.append(t["place_u"][at].expand(B, -1, -1))
                w.append(t["place_w"][at].expand(B, -1, -1))
            else:
                continue
            gates.append(self.gates[..., g : g + 1].expand(-1, -1, u[-1].size(-1)))
        looked = torch.cat([x.to(dtype) for x in w], -1)
        keys = looked if cache is None else cache.look(seen, looked)
        looked = torch.cat([x.to(dtype) for x in u], -1)
        out: list[Bias | None] = [None] * len(self.windows)
        for layer, gate in enumerate(torch.cat(gates, -1).to(dtype).unbind()):
            blocks = (
                flex_blocks(T, self.windows[layer], idx.device) if self._backend == "flex" else None
            )
            where = (
                (nothing, nothing.expand(self.heads))
                if place is None
                else (place, self.gates[layer, :, -1])
            )
            if place is not None and self.spec["rows"]:
                where = place[self.spec["rows"][layer], None], where[1]
            out[layer] = Bias(looked, keys, gate, *where, self._backend, blocks)
        return out

    def _looks_up(self, device: torch.device) -> bool:
        """Whether the kernel can look positions up; else they are columns of u and w."""
        return self._backend != "factored" or device.type == "cpu"

    def _choose(self, t: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> str:
        """The backend that adds on this device what was trained with, perhaps on another."""
        exact = (
            device.type != "cpu" and "place" in t and "place_u" not in t
        )  # positions must be looked up: factored cannot
        backend = (
            "flex" if exact and self.spec["attention"] == "factored" else self.spec["attention"]
        )
        if backend == "flex" and (
            missing := flex_missing(device, dtype, self.head_dim + self.rank)
        ):
            backend = "dense" if exact else "factored"
            notice(f"{missing}: the prior is added in the {backend} form")
        return backend


@torch.no_grad()
def warm_start(model: Any, spec: dict[str, Any], tensors: dict[str, Tensor], alpha: float) -> None:
    """
    Mode B: rows of W_Q and W_K such that the expected score of matching tokens is `alpha` at the start, and no bias afterwards.

    With x the normalised embeddings, least squares gives W_Q x ~ codes query and W_K x ~ sum_s codes keys[s]: the rules of all shifts
    are folded onto the key's own token, as no first layer knows the one before it. QK-norm makes scores of size sqrt(D), so these rows
    get the share alpha / sqrt(D) of a head's power and the random rows keep the rest; they lie in the slowest rotary channels, where
    rotation hardly turns them. lag, key and pair cannot be carried: embeddings have no common direction, and hold one token each.
    """
    if "codes" not in tensors:
        raise UserError(
            "--rap_mode=warmstart needs a prior with match: distances and key tokens cannot be carried by W_Q and W_K"
        )
    c, device = model.config, model.embed.weight.device
    layers, heads, _ = spec["tensors"]["gates"][1:]
    codes = tensors["codes"][:-1].to(device, torch.float32)
    x = F.rms_norm(model.embed.weight[: c.vocab_size].float(), (c.n_embd,))
    targets = torch.cat(
        (codes @ tensors["query"].to(device), codes @ tensors["keys"].sum(0).to(device)), 1
    )
    rows = torch.linalg.lstsq(x, targets).solution.mT.view(2, -1, c.n_embd)[:, : c.head_dim]
    D, r = c.head_dim, rows.size(1)
    slow = [D - 1 - n // 2 - (n % 2) * (D // 2) for n in range(r)]
    share = min(1.0, alpha / D**0.5) if r < D else 1.0
    for attn in (block.attn for block in model.blocks[:layers]):
        for weight, made, n in (
            (attn.q.weight, rows[0], heads),
            (attn.k.weight, rows[1], -(-heads * c.n_kv_head // c.n_head)),
        ):
            by_head = weight.view(-1, D, c.n_embd)[:n]
            power = by_head.square().sum((1, 2), keepdim=True)
            by_head[:, slow] = 0
            by_head *= (
                (1 - share) * power / by_head.square().sum((1, 2), keepdim=True).clamp(min=1e-12)
            ).sqrt()
            by_head[:, slow] = made * (share * power / made.square().sum()).sqrt()
