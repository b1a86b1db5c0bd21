"""
One optimizer for the whole model: Muon for matrices, AdamW for the rest, on any number of ranks.

It sums the gradients over the ranks itself, so the model needs no wrapper: each rank receives the
sum for the parameters that it owns, updates them and sends the result to the others. Each part of
the state therefore exists on one rank only. Checkpoints store the state by parameter name, and do
not depend on the number of ranks. The optimizer does not depend on the model: its parameters come
in `Group`s, which train/run.py makes from the model's roster.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat.train.polynomials import POLYNOMIALS, Polynomials

listwise: Any = torch  # whose _foreach_ functions, on lists of tensors, pyright does not know
MOMENTS = {"muon": ("momentum",), "adamw": ("first", "second")}  # state tensors per parameter


@dataclass
class Group:
    """Parameters with the same optimizer and settings, and their state."""

    optimizer: str  # "muon" | "adamw"
    params: dict[str, Tensor]  # by name
    lr: float  # the peak, which the schedule multiplies by a factor
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    # The part that this rank owns: parameter -> moment -> tensor
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counts: list[Tensor] = field(default_factory=list)  # AdamW's steps so far, per parameter


def orthogonalize(
    g: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    polynomials: Polynomials = POLYNOMIALS["minimax"],
) -> Tensor:
    """
    Newton-Schulz steps towards the nearest semi-orthogonal matrix: g (R, C) or (N, R, C) -> the
    same shape in `dtype`. The singular vectors stay the same, and the singular values approach 1.
    """
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in polynomials:  # x <- a x + (b G + c G^2) x with G = x x^T
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class _Pool:
    """
    Parameters that the ranks divide among themselves: either matrices of one shape, each of which
    belongs to one rank, or a single table, of which each rank owns some rows.
    """

    def __init__(self, params: dict[str, Tensor], matrices: bool):
        self.names, self.params, self.matrices = [*params], [*params.values()], matrices
        rank, self.world = 0, 1
        if dist.is_initialized():
            rank, self.world = dist.get_rank(), dist.get_world_size()
        self.size = len(params) if matrices else self.params[0].size(0)
        # Matrices or rows per rank; the last ranks may own fewer, or none
        self.share = -(-self.size // self.world)
        self.own = slice(rank * self.share, (rank + 1) * self.share)

    def owned(self, items: list) -> list:
        """Of items, one per parameter: those of parameters that this rank has a part of."""
        return items[self.own] if self.matrices else items

    def part(self, t: Tensor) -> Tensor:
        """This rank's part of such a parameter, or of a tensor of its shape."""
        return t if self.matrices else t[self.own]

    def _join(self, tensors: list[Tensor], size: int) -> Tensor:
        """The tensors as one, of `size` matrices or rows: missing ones are zeros."""
        if self.matrices:
            blank = torch.zeros_like(self.params[0])
            return torch.stack([*tensors, *[blank] * (size - len(tensors))])
        (table,) = tensors
        missing = size - table.size(0)
        if missing:
            table = torch.cat([table, table.new_zeros(missing, *table.shape[1:])])
        return table.contiguous()

    def _split(self, joined: Tensor, size: int) -> list[Tensor]:
        return list(joined[:size].unbind()) if self.matrices else [joined[:size]]

    def sum_gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, summed over all ranks; a missing gradient is 0."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if self.world == 1:
            return grads
        whole = self._join(grads, self.share * self.world)
        own = torch.empty_like(whole[: self.share])
        dist.reduce_scatter_single(own, whole)
        return self._split(own, max(0, self.size - self.own.start))

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """Whole tensors of the parameters' shapes, from the parts of all ranks."""
        if self.world == 1:
            return parts
        own = self._join(parts, self.share)
        whole = own.new_empty((self.share * self.world, *own.shape[1:]))
        dist.all_gather_single(whole, own)
        return self._split(whole, self.size)

    def share_parameters(self) -> None:
        """Give every rank the parts that the others have updated."""
        if self.world > 1:
            whole = self.gather([self.part(p) for p in self.owned(self.params)])
            for p, new in zip(self.params, whole, strict=True):
                p.copy_(new)


def _pools(group: Group) -> list[_Pool]:
    matrices = group.optimizer == "muon"
    pools: dict[Any, dict[str, Tensor]] = {}
    for name, p in group.params.items():
        pools.setdefault(p.shape if matrices else name, {})[name] = p
    return [_Pool(params, matrices) for params in pools.values()]


class MuonAdamW:
    """
    Muon and AdamW over groups of parameters: call step() after the backward passes of a training
    step, and zero_grad() before the next.

    ns_dtype: the precision of the Newton-Schulz products (bfloat16 where it is fast, else float32).
    polynomials: of the Newton-Schulz steps; see POLYNOMIALS.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        ns_dtype: torch.dtype = torch.bfloat16,
        polynomials: Polynomials = POLYNOMIALS["minimax"],
    ):
        self.groups, self.ns_dtype, self.polynomials = list(groups), ns_dtype, polynomials
        self.steps = 0
        self._pools = [(group, _pools(group)) for group in self.groups]

    @property
    def params(self) -> list[Tensor]:
        return [p for g in self.groups for p in g.params.values()]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr_mult: float = 1.0, momentum: float = 0.95) -> None:
        """
        One update with all rates multiplied by lr_mult (0..1). momentum: Muon's. Every rank must
        call it.
        """
        self.steps += 1
        for group, pools in self._pools:
            lr = group.lr * lr_mult
            if group.optimizer == "adamw":
                self._adamw(group, pools, lr)
            else:
                for pool in pools:
                    self._muon(group, pool, lr, momentum)

    def _state(self, group: Group, pool: _Pool) -> list[dict[str, Tensor]]:
        """The moments of this rank's parts of the parameters; zeros at first."""
        names = pool.owned(pool.names)
        for name, p in zip(names, pool.owned(pool.params), strict=True):
            if name not in group.state:
                moments = MOMENTS[group.optimizer]
                group.state[name] = {m: torch.zeros_like(pool.part(p)) for m in moments}
        return [group.state[name] for name in names]

    def _muon(self, group: Group, pool: _Pool, lr: float, momentum: float) -> None:
        grads, owned = pool.sum_gradients(), pool.owned(pool.params)
        if owned:  # lists of tensors, for few kernel launches: they dominate with small models
            momenta = [state["momentum"] for state in self._state(group, pool)]
            listwise._foreach_lerp_(momenta, grads, 1 - momentum)
            updates = listwise._foreach_lerp(grads, momenta, momentum)  # Nesterov
            if updates[0].device.type == "cpu":  # as fast one by one, and with less memory
                updates = [orthogonalize(u, self.ns_dtype, self.polynomials) for u in updates]
            else:
                stacked = orthogonalize(torch.stack(updates), self.ns_dtype, self.polynomials)
                updates = stacked.to(updates[0].dtype).unbind()
            rows, columns = owned[0].shape
            if group.weight_decay:
                listwise._foreach_mul_(owned, 1 - lr * group.weight_decay)
            listwise._foreach_add_(owned, updates, alpha=-lr * max(1.0, rows / columns) ** 0.5)
        pool.share_parameters()

    def _adamw(self, group: Group, pools: list[_Pool], lr: float) -> None:
        owned = [
            (pool.part(pool.params[0]), *pool.sum_gradients(), *self._state(group, pool))
            for pool in pools
        ]
        params, grads, states = zip(*owned, strict=True)
        if not group.counts:  # adamw() counts further, on the device
            group.counts = [torch.full((), self.steps - 1.0, device=p.device) for p in params]
        adamw(
            list(params),
            list(grads),
            [state["first"] for state in states],
            [state["second"] for state in states],
            [],
            group.counts,
            fused=True,
            amsgrad=False,
            beta1=group.betas[0],
            beta2=group.betas[1],
            lr=lr,
            weight_decay=group.weight_decay,
            eps=1e-10,
            maximize=False,
        )
        for pool in pools:
            pool.share_parameters()

    def state_bytes(self) -> int:
        """Bytes of the state on all ranks together."""
        return sum(
            len(MOMENTS[g.optimizer]) * p.nbytes for g in self.groups for p in g.params.values()
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """
        The whole state as {name/moment: tensor of the parameter's shape}, gathered from all ranks:
        every rank must call it.
        """
        out: dict[str, Tensor] = {}
        for group, pools in self._pools:
            for pool in pools:
                states = self._state(group, pool)
                for moment in MOMENTS[group.optimizer]:
                    whole = pool.gather([state[moment] for state in states])
                    names = [f"{name}/{moment}" for name in pool.names]
                    out.update(zip(names, whole, strict=True))
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """
        Load this rank's part of what state_tensors returned; `steps` is how many updates were made.
        KeyError if a tensor is missing.
        """
        self.steps = steps
        for group, pools in self._pools:
            group.counts = []
            for pool in pools:
                for name in pool.owned(pool.names):
                    group.state[name] = {
                        moment: pool.part(tensors[f"{name}/{moment}"]).to(
                            pool.params[0].device, torch.float32, copy=True
                        )
                        for moment in MOMENTS[group.optimizer]
                    }
