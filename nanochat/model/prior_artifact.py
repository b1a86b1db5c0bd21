"""
Artifacts of the attention prior: reading them, checking them, and preparing them for a model.

An artifact (made by dev/generate_rap_prior.py) holds terms in groups. Between query i and key j of
tokens x, group g contributes B_g[i, j]:

    lag    lag[i - j]: how useful a token is at a distance, if the artifact has lag; in the heads
           that lead with a span, spans[n, i - j] instead; or bias[i, j], any matrix of positions
    key    key[x_j]: tokens that are worth attending to, whatever the query
    match  sum_s codes[x_i] . match[s] codes[x_(j-s)], codes of -1 and 1: s = 1 is the copy rule
    pair   the same for two tokens: with codes a and b,
           sum_p pair[p] (a[x_(i-1)] b[x_i])[p] (a[x_(j-2)] b[x_(j-1)])[p]

Terms with a token before the first one are 0. Loading an artifact cannot run code.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nanochat.base.common import UserError, notice, user_path
from nanochat.base.files import sha256_file
from nanochat.base.strangers import open_regular
from nanochat.model.attention import attention_form
from nanochat.model.config import AttentionPriorKnobs, GPTConfig

Tensors = dict[str, Tensor]  # by name
FORMAT = "rap-1"
GROUPS = {  # the tensors of each group, with a letter for each of their sizes
    "lag": {"lag": "T"},
    "spans": {"spans": "NT"},
    "bias": {"bias": "LL"},
    "key": {"key": "V"},
    "match": {"codes": "VP", "match": "SPP"},
    "pair": {"pair_query": "VQ", "pair_now": "VQ", "pair": "Q"},
}
CODES = ("codes", "pair_query", "pair_now")
LAG_COLUMNS = 64  # the most for lag, where kernels need positions as columns of q and k
KERNEL_WIDTH = 256  # the widest heads that fused kernels support


# ---- reading


def load(path: str, vocab_size: int, fingerprint: str) -> tuple[Tensors, str]:
    """
    The checked tensors of an artifact, or of a file with one matrix, and a note on their source.
    Raises UserError for a damaged file, another format or another tokenizer.
    """
    path = str(user_path(path))
    tensors, about = _read(path)
    matrix_alone = about.get("format") in (None, "pt") and len(tensors) == 1  # from elsewhere
    if matrix_alone:
        tensors = {"bias": next(iter(tensors.values()))}
    depends_on_tokens = tensors.keys() - {"lag", "spans", "bias"}
    tokenizer = about.get("tokenizer", "unknown" if depends_on_tokens else fingerprint)
    if not matrix_alone and about.get("format") != FORMAT:
        fault = f"has format {about.get('format')!r}, but this version reads {FORMAT!r}"
    elif tokenizer != fingerprint:
        fault = f"is for tokenizer {tokenizer[:12]}, but this run's is {fingerprint[:12]}"
    else:
        fault = _fault(tensors, vocab_size)
    if fault:
        raise UserError(
            f"the prior {path} {fault}: generate it again, from token shards of this tokenizer, "
            "with dev/generate_rap_prior.py"
        )
    if matrix_alone:
        matrix = tensors["bias"].float()
        largest = matrix.tril().abs().max()
        tensors["bias"] = matrix / (largest if largest > 0 else 1.0)
    return tensors, f"{about.get('generator', 'matrix')} {sha256_file(path)[:8]}"


def _read(path: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a .safetensors file, or the one tensor of a .pt file."""
    try:
        open_regular(path).close()  # a pipe would never end
        if path.endswith(".pt"):
            with warnings.catch_warnings(action="ignore"):  # an error says what is wrong
                return {"bias": torch.load(path, map_location="cpu", weights_only=True)}, {}
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as e:  # torch.load reports a bad pickle in many ways
        reason = str(e).splitlines()[0].split(". ")[0] if str(e) else type(e).__name__
        raise UserError(
            f"cannot read the prior {path} as plain tensors ({reason}): make one with "
            "dev/generate_rap_prior.py, or save a single 2-D tensor"
        ) from e


def _fault(tensors: Tensors, vocab_size: int) -> str:
    """What is wrong with the tensors of an artifact; '' if nothing is."""
    sizes = {"V": vocab_size}  # the first tensor with another letter decides its size
    for name, tensor in tensors.items():
        if fault := _tensor_fault(name, tensor, tensors, sizes):
            return fault
    if not tensors or ("bias" in tensors and len(tensors) > 1):
        return "holds bias together with other terms, or nothing"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """Whether all values of a tensor are in memory: else a small file could claim huge tensors."""
    strided = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _tensor_fault(name: str, tensor: Tensor, tensors: Tensors, sizes: dict[str, int]) -> str:
    """
    What is wrong with one tensor; '' if nothing is. Its sizes must agree with `sizes`, to which
    new ones are added.
    """
    group = next((g for g in GROUPS.values() if name in g), None)
    if not isinstance(tensor, Tensor) or not tensor.dim():
        return "holds no tensor where one should be"
    if not _is_plain(tensor):
        return "holds a sparse, quantised, expanded or meta tensor, not a plain one"
    if group is None:
        return f"holds {name}, which is no term of a prior"
    if missing := group.keys() - tensors.keys():
        return f"holds {name} without {', '.join(sorted(missing))}"
    shape, letters = tuple(tensor.shape), group[name]
    fits = len(shape) == len(letters) and 0 not in shape
    if not fits or any(sizes.setdefault(x, n) != n for x, n in zip(letters, shape, strict=True)):
        expected = (f"{x} = {sizes[x]:,}" if x in sizes else x for x in letters)
        return f"has {name} of shape {shape}, not {', '.join(expected)}"
    if name in CODES:
        kind = "-1 and 1 as int8"
        valid = tensor.dtype == torch.int8 and bool((tensor.abs() == 1).all())
    else:
        kind = "finite float32"
        valid = tensor.is_floating_point() and bool(tensor.float().isfinite().all())
    return "" if valid else f"has {name} as {tensor.dtype}, not {kind}"


# ---- factorising


def factor_lag(lag: Tensor, error: float, most: int = LAG_COLUMNS) -> tuple[Tensor, Tensor, float]:
    """
    Columns u, w (C, r) with u[i] . w[j] close to lag[i - j] for all i >= j, and the largest error.
    r is the smallest that meets `error`, or at most `most`. lag (C,) becomes the sum of a constant
    and of waves a cos + b sin, which are bounded at every distance and unconstrained above the
    diagonal. Frequencies come from matching pursuit on the residual's spectrum, amplitudes from
    least squares. Sharp curves need many columns, because a wave cannot stay low after a narrow
    peak.
    """
    C, lag = lag.numel(), lag.double()
    distance = torch.arange(C, dtype=torch.float64)
    columns = [torch.ones(C, dtype=torch.float64)]
    while True:
        waves = torch.stack(columns, 1)
        amplitude = torch.linalg.lstsq(waves, lag[:, None], driver="gelsd").solution[:, 0]
        residual = lag - waves @ amplitude
        worst = float(residual.abs().max())
        if worst <= error or len(columns) + 2 > min(most, C):
            break
        peak = float(torch.fft.rfft(residual, 8 * C)[1:].abs().argmax() + 1)
        angle = peak * torch.pi / (4 * C) * distance
        columns += [torch.cos(angle), torch.sin(angle)]
    w = [columns[0] * amplitude[0]]
    for n in range(1, len(columns), 2):  # a cos(f (i - j)) + b sin(f (i - j))
        (a, b), (cos, sin) = amplitude[n : n + 2], columns[n : n + 2]
        w += [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(columns, 1).float(), torch.stack(w, 1).float(), worst


def factor_match(
    codes: Tensor, match: Tensor, error: float
) -> tuple[list[int], Tensor, Tensor, float]:
    """
    The shifts s with a match, query (P, r) and keys (shifts, P, r) such that
    sum_s a . match[s] b_s is close to (a query) . sum_s b_s keys[s], and the largest error between
    tokens (of a sample of 512). An SVD of match with its shifts side by side; r is the smallest
    that meets `error`.
    """
    shifts = [s for s in range(match.size(0)) if match[s].any()] or [0]
    wide = match[shifts].double()
    S, P, _ = wide.shape
    U, values, V = torch.linalg.svd(wide.permute(1, 0, 2).reshape(P, S * P), full_matrices=False)
    query, keys = U * values.sqrt(), (V.mT * values.sqrt()).view(S, P, -1)
    sample = torch.linspace(0, codes.size(0) - 1, min(512, codes.size(0))).long()
    some = codes[sample].double()
    r, worst = 0, math.inf
    while worst > error and r < P:
        r += 1
        residual = wide - query[:, :r] @ keys[:, :, :r].mT
        worst = float((some @ residual @ some.T).abs().amax((1, 2)).sum())
    return shifts, query[:, :r].float(), keys[:, :, :r].float(), worst


# ---- preparing


class _Terms(NamedTuple):
    """The groups of an artifact in the form in which a model adds them."""

    tensors: Tensors
    columns: dict[str, int]  # of q and k, by group
    errors: dict[str, float]  # of factorisations, by group
    shifts: list[int]  # of match


def prepare(
    knobs: AttentionPriorKnobs,
    config: GPTConfig,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], Tensors]:
    """
    (spec for `config.rap`, tensors of `prior.Prior`) of the prior that the knobs name, for a model
    of `config` that will be trained on this device. Where kernels look up positions (on a CPU, and
    in the flex and dense forms), the terms by position stay exact. Elsewhere they are replaced by
    an approximation, in the tables as well: every device that loads the checkpoint then adds the
    same. UserError for a prior that cannot be used.
    """
    artifact, source = load(knobs.rap, config.vocab_size, fingerprint)
    layers, heads = _extent(knobs, config)
    terms = _token_terms(artifact, knobs.rap_error)
    tensors, columns, _, shifts = terms
    spans, on_cpu = len(artifact.get("spans", ())), device.type == "cpu"
    sharp = bool(spans) or "bias" in artifact  # positions that a few columns cannot approximate
    if sharp and knobs.attention == "factored" and not on_cpu:
        raise UserError(
            "--attention=factored cannot add the spans or the matrix of this prior on a GPU: "
            "leave the flag out, or generate the prior with --spans 0"
        )
    form = "factored" if knobs.attention == "auto" else knobs.attention
    width = config.head_dim + sum(columns.values())
    form = attention_form(form, device, dtype, width, sharp)
    error = knobs.rap_error if form == "factored" and not on_cpu else None
    reach = _add_positions(terms, artifact, config.sequence_len, error)
    rank = sum(columns.values())
    if not on_cpu and config.head_dim + rank > KERNEL_WIDTH:
        raise UserError(
            f"the prior {knobs.rap} has rank {rank}, which together with head_dim "
            f"{config.head_dim} exceeds the {KERNEL_WIDTH} columns that attention kernels "
            "support: raise --rap_error, or generate the prior with fewer codes"
        )
    tensors["gates"], rows = _initial_gates(knobs, list(columns), spans, layers, heads)
    if knobs.rap_gate == "annealed":
        tensors["start"] = tensors["gates"].clone()
    spec = {
        "attention": form,
        "columns": [list(item) for item in columns.items()],
        "shifts": shifts,
        "learned": knobs.rap_gate == "learned",
        "rows": rows if spans else [],
        "reach": reach,
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()
        },
        "about": f"{source}: {_summary(terms, spans)}",
    }
    return spec, tensors


def _extent(knobs: AttentionPriorKnobs, config: GPTConfig) -> tuple[int, int]:
    """(layers with the prior, heads of each). UserError if the knobs give none or too many."""
    share = knobs.rap_heads <= 1
    heads = round(knobs.rap_heads * config.n_head) if share else int(knobs.rap_heads)
    if not 0 < heads <= config.n_head or not (share or heads == knobs.rap_heads):
        raise UserError(
            f"--rap_heads must be a number of heads from 1 to {config.n_head}, or a share up to "
            f"1 that comes to at least one head (got {knobs.rap_heads:g})"
        )
    if knobs.rap_layers > config.n_layer:
        raise UserError(
            f"--rap_layers={knobs.rap_layers} is more than the model's {config.n_layer} layers: "
            "leave it out for all"
        )
    return knobs.rap_layers or config.n_layer, heads


def _token_terms(artifact: Tensors, error: float) -> _Terms:
    """
    The groups that depend on tokens. Codes get a row of zeros, for positions before the first
    token.
    """
    tensors = {name: F.pad(artifact[name], (0, 0, 0, 1)) for name in CODES if name in artifact}
    columns, errors, shifts = {}, {}, []
    if "key" in artifact:
        tensors["key"] = artifact["key"].float()
        columns["key"] = 1
    if "match" in artifact:
        factors = factor_match(artifact["codes"], artifact["match"], error)
        shifts, tensors["query"], tensors["keys"], errors["match"] = factors
        columns["match"] = tensors["query"].size(1)
    if "pair" in artifact:
        used = artifact["pair"].nonzero()[:, 0]
        tensors["pair"] = artifact["pair"].float()
        tensors |= {name: tensors[name][..., used] for name in GROUPS["pair"]}
        columns["pair"] = len(used)
    return _Terms(tensors, columns, errors, shifts)


def _add_positions(terms: _Terms, artifact: Tensors, C: int, error: float | None) -> int | None:
    """
    Add the groups that depend on positions: exactly, or as columns of q and k with this error.
    Returns the number of distances that they reach; None for a matrix, or without such groups.
    """
    tensors, columns, errors, _ = terms
    if "bias" in artifact:
        matrix = artifact["bias"][:C, :C].float()
        tensors["place"] = F.pad(matrix, (0, C - len(matrix)) * 2)
        columns["bias"] = 0
    lag, spans = artifact.get("lag"), [*artifact.get("spans", ())]
    if lag is None and not spans:
        return None
    curves = torch.stack([torch.zeros_like(spans[0]) if lag is None else lag, *spans])
    curves = curves[:, :C].float()
    curves = F.pad(curves, (0, C + 1 - curves.size(1)))  # lag, then the spans, which end with 0
    columns["lag"] = 0
    if error is not None:
        u, w, errors["lag"] = factor_lag(curves[0, :C], error)
        columns["lag"] = u.size(1)
        if errors["lag"] > error:
            notice(
                f"the prior's lag term, in {u.size(1)} columns, has an error of "
                f"{errors['lag']:.2g}, above --rap_error: use --attention=flex to add it exactly"
            )
        tensors |= {"place_u": u, "place_w": w}
        curves = F.pad((w[0] @ u.mT)[None], (0, 1))
    tensors["place"] = curves if spans else curves[0]
    return max([0, *(curves.any(0).nonzero() + 1).flatten().tolist()])


def _initial_gates(
    knobs: AttentionPriorKnobs, groups: list[str], spans: int, layers: int, heads: int
) -> tuple[Tensor, list[list[int]]]:
    """
    (gates at the start (layers, heads, groups), the curve of positions for each head of each
    layer: 0 for lag, or n for the span n). One head of each layer starts with a larger gate for
    match, one for pair and one for each span (or for lag): it leads with this term. If all heads
    were alike, training would first have to differentiate them.
    """
    leads = [(groups.index(name), 0) for name in ("match", "pair") if name in groups]
    if "lag" in groups:
        leads += [(groups.index("lag"), curve) for curve in range(1, spans + 1) or [0]]
    gates = torch.full((layers, heads, len(groups)), knobs.rap_alpha)
    rows = [[0] * heads for _ in range(layers)]
    for layer, head, item in assign_leading_heads(len(leads), layers, heads):
        group, rows[layer][head] = leads[item]
        gates[layer, head, group] = knobs.rap_lead or knobs.rap_alpha
    return gates, rows


def assign_leading_heads(items: int, layers: int, heads: int) -> list[tuple[int, int, int]]:
    """
    (layer, head, item) for each head that leads with an item: every layer gives all items to its
    first heads; where there are fewer heads than items, the next layer continues.
    """
    step = heads if heads < items else 0
    return [
        (layer, head, (layer * step + head) % items)
        for layer in range(layers)
        for head in range(min(items, heads))
    ]


def _summary(terms: _Terms, spans: int) -> str:
    """The terms in words: "key rank 1, match rank 8 (error 0.012), lag, 4 spans"."""
    words = []
    for name, rank in terms.columns.items():
        error = f" (error {terms.errors[name]:.2g})" if name in terms.errors else ""
        words.append(f"{name} rank {rank}{error}" if rank else name)
    return ", ".join(words) + (f", {spans} spans" if spans else "")
