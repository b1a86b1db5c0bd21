"""
The attention prior (RAP) inside a model: tables of its terms, and gates that scale the terms.

A prior adds to the score of layer l, head h, query i and key j the sum over its groups g of
gates[l, h, g] * B_g[i, j]; prior_artifact.py describes the groups. For each pass, `Prior` looks up
the tokens in its tables, and attention.py adds the result to the scores. The tables are buffers, so
a checkpoint does not need the artifact. Positions are absolute, and a prior looks across documents
as attention does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.model.attention import Bias, attention_form, flex_mask
from nanochat.model.cache import KVCache


class Prior(nn.Module):
    """
    The tables and gates described by a spec of prior_artifact.prepare. gates (layers, heads,
    groups) are parameters if they are learned; everything else is a buffer. If `annealed` is set,
    set_progress lowers the gates linearly from their start to 0.
    """

    def __init__(self, spec: dict[str, Any], windows: list[int], head_dim: int):
        super().__init__()
        self.spec, self.windows, self.head_dim = spec, windows, head_dim
        self.annealed = False
        for name, (dtype, *shape) in spec["tensors"].items():
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            if name == "gates" and spec["learned"]:
                self.gates = nn.Parameter(tensor)
            else:
                self.register_buffer(name, tensor)
        codes = spec["tensors"].get("codes") or spec["tensors"].get("pair_now")
        self.no_token = codes[1] - 1 if codes else 0  # the row of zeros, for positions before 0
        # How many positions before a token its terms look back
        self.memory = max([*spec["shifts"], 2 if "pair" in spec["tensors"] else 0])
        self.layers, self.heads = spec["tensors"]["gates"][1:3]
        self.rank = sum(n for _, n in spec["columns"])
        self._form = ""  # chosen in the first pass
        self._rows_on_device: Tensor | None = None

    def describe(self) -> str:
        """One line to print: its source and terms, its layers and heads, its gates, its form."""
        kind = "learned" if self.spec["learned"] else "annealed" if self.annealed else "fixed"
        extent = f"{self.heads} heads of {self.layers} layers"
        return f"{self.spec['about']}; {extent}, gates {kind}, {self.spec['attention']}"

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        """Set annealed gates to their value at this progress of the run, 0..1."""
        if self.annealed:
            self.gates.copy_(self.get_buffer("start") * (1 - progress))

    def form(self, device: torch.device, dtype: torch.dtype) -> str:
        """The form (see attention.py) for this device, which may not be the one of training."""
        tables = self.spec["tensors"]
        look_up = "place" in tables and "place_u" not in tables
        width = self.head_dim + self.rank
        return attention_form(self.spec["attention"], device, dtype, width, look_up)

    def forward(
        self, idx: Tensor, dtype: torch.dtype, cache: KVCache | None = None
    ) -> list[Bias | None]:
        """
        The bias of every layer, None where it has none, for tokens idx (B, T), which continue the
        sequences of the cache. The terms are looked up once for all layers.
        """
        self._form = self._form or self.form(idx.device, dtype)
        (B, T), device = idx.shape, idx.device
        if cache is None:
            positions = torch.arange(T, device=device)[None]
            tokens = F.pad(idx, (self.memory, 0), value=self.no_token)
        else:
            positions = cache.positions
            tokens = cache.with_earlier_tokens(idx, self.memory, self.no_token)

        def earlier(s: int) -> Tensor:
            """The tokens s positions before those of idx: (B, T)."""
            return tokens[:, self.memory - s : self.memory - s + T]

        place = getattr(self, "place", None) if self.looks_up(device) else None
        all_u = [idx.new_zeros(B, T, 0, dtype=dtype)]
        all_w, columns = [*all_u], []
        for name, _ in self.spec["columns"]:
            if name in ("lag", "bias") and place is not None:
                break  # the group by position is the last one
            u, w = self._columns(name, earlier, positions)
            all_u.append(u.to(dtype).expand(B, -1, -1))
            all_w.append(w.to(dtype).expand(B, -1, -1))
            columns.append(u.size(-1))
        u, w = torch.cat(all_u, -1), torch.cat(all_w, -1)
        w = w if cache is None else cache.with_earlier_columns(w)
        place_gates, reach = self.gates[..., -1], self.spec.get("reach")
        if place is None:
            place = self.gates.new_zeros(1)
            place_gates, reach = place.expand(self.layers, self.heads), 0
        if self.spec["rows"]:
            place = place[self._rows(device)]
        biases: list[Bias | None] = [None] * len(self.windows)
        gates = self.gates[..., : len(columns)].contiguous().to(dtype)
        for layer, gate in enumerate(gates.unbind()):
            mask = None
            if self._form == "flex":
                mask = flex_mask(T, self.windows[layer], device)
            biases[layer] = Bias(
                u,
                w,
                gate,
                place[layer, :, None] if self.spec["rows"] else place,
                place_gates[layer],
                tuple(columns),
                reach,
                self._form,
                mask,
            )
        return biases

    def _rows(self, device: torch.device) -> Tensor:
        """(layers, heads): which row of `place` each head has; copied to the device once."""
        if self._rows_on_device is None or self._rows_on_device.device != device:
            self._rows_on_device = torch.tensor(self.spec["rows"], device=device)
        return self._rows_on_device

    def looks_up(self, device: torch.device) -> bool:
        """Whether the kernel looks up positions in `place`; else they are columns of u and w."""
        return self._form != "factored" or device.type == "cpu"

    def _columns(
        self, name: str, earlier: Callable[[int], Tensor], positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The columns u and w of a group, for queries and for keys: (1 or B, T, rank) each."""
        tables, now = dict(self.named_buffers()), earlier(0)
        if name == "key":
            w = tables["key"][now][..., None]
            return torch.ones_like(w), w
        if name == "match":
            u = tables["codes"][now].to(tables["query"].dtype) @ tables["query"]
            w = [
                tables["codes"][earlier(s)].to(keys.dtype) @ keys
                for s, keys in zip(self.spec["shifts"], tables["keys"], strict=True)
            ]
            return u, sum(w[1:], w[0])
        if name == "pair":
            u = tables["pair_query"][earlier(1)] * tables["pair_now"][now] * tables["pair"]
            return u, tables["pair_query"][earlier(2)] * tables["pair_now"][earlier(1)]
        return tables["place_u"][positions], tables["place_w"][positions]


@torch.no_grad()
def warm_start(model: Any, spec: dict[str, Any], tensors: dict[str, Tensor], alpha: float) -> None:
    """
    Initialise rows of W_Q and W_K such that the expected score of matching tokens is `alpha`; the
    model has no bias then. Raises UserError for a prior without the match term.

    With x the normalised embeddings, least squares gives W_Q x ~ codes query and
    W_K x ~ sum_s codes keys[s]: the rules of all shifts apply to the key's own token, as no first
    layer knows the token before it. QK-norm makes scores of size sqrt(D), so these rows get the
    share alpha / sqrt(D) of a head's power, and the random rows keep the rest. They lie in the
    slowest rotary channels, where rotation changes little. lag, key and pair cannot be carried over
    to W_Q and W_K: embeddings have no common direction, and each holds only one token.
    """
    if "codes" not in tensors:
        raise UserError(
            "--rap_mode=warmstart needs a prior with a match term, because W_Q and W_K cannot "
            "express distances or key tokens: use another prior, or --rap_mode=bias"
        )
    config, device = model.config, model.embed.weight.device
    layers, heads, _ = spec["tensors"]["gates"][1:]
    kv_heads = -(-heads * config.n_kv_head // config.n_head)
    codes = tensors["codes"][:-1].to(device, torch.float32)
    query, key = tensors["query"].to(device), tensors["keys"].sum(0).to(device)
    x = F.rms_norm(model.embed.weight[: config.vocab_size].float(), (config.n_embd,))
    targets = torch.cat((codes @ query, codes @ key), 1)
    D = config.head_dim
    # On the CPU, because not every device has lstsq
    solved = torch.linalg.lstsq(x.cpu(), targets.cpu()).solution.to(device)
    rows = solved.mT.view(2, -1, config.n_embd)[:, :D]
    r = rows.size(1)
    # The slowest channels: the last ones of the two halves, in turn
    slow = [D - 1 - n // 2 - (n % 2) * (D // 2) for n in range(r)]
    share = min(1.0, alpha / D**0.5) if r < D else 1.0
    for block in model.blocks[:layers]:
        for linear, new, n in ((block.attn.q, rows[0], heads), (block.attn.k, rows[1], kv_heads)):
            by_head = linear.weight.view(-1, D, config.n_embd)[:n]
            power = by_head.square().sum((1, 2), keepdim=True)
            by_head[:, slow] = 0
            kept = by_head.square().sum((1, 2), keepdim=True).clamp(min=1e-12)
            by_head *= ((1 - share) * power / kept).sqrt()
            by_head[:, slow] = new * (share * power / new.square().sum()).sqrt()
