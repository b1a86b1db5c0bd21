"""
One optimizer for the whole model: Muon for matrices, AdamW for the rest, on 1..N ranks.

Gradients are summed over the ranks here, not by a wrapper: each rank receives the sum for the parameters it owns, updates them,
and hands the result round. Optimizer state therefore exists once over all ranks (matrices are dealt out whole, tables by rows).
`state_dict` is gathered by parameter name, so a checkpoint does not depend on the number of ranks that wrote it.
It knows no model: what it needs of a parameter comes in `Group`s, built from the roster.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

NS_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic of Jordan et al., "Muon: an optimizer for hidden layers" (2024)


@dataclass
class Group:
    """Parameters that share an optimizer and its settings. `lr` is the peak rate; the schedule multiplies it."""

    optimizer: str  # "muon" | "adamw"
    names: list[str]
    params: list[Tensor]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    momentum: float = 0.95
    state: dict[str, dict[str, Tensor]] = field(
        default_factory=dict
    )  # by parameter name; what this rank owns


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, batched: g (..., R, C) -> the same shape in `dtype`."""
    a, b, c = NS_COEFFICIENTS
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW:
    """
    `step(lr_mult, momentum)` after the backward passes of a step; `zero_grad()` before the next.

    ns_dtype: the precision of the Newton-Schulz products (bf16 where it is fast, else float32).
    A parameter whose gradient is None is treated as having a zero one, so that all ranks walk the same road.
    """

    def __init__(self, groups: Iterable[Group], ns_dtype: torch.dtype = torch.bfloat16):
        self.groups, self.ns_dtype = list(groups), ns_dtype
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.steps = 0

    @property
    def params(self) -> list[Tensor]:
        return [p for g in self.groups for p in g.params]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr_mult: float = 1.0, momentum: float | None = None) -> None:
        """One update with every rate multiplied by lr_mult (0..1) and, where given, Muon's momentum."""
        self.steps += 1
        for group in self.groups:
            if group.optimizer == "muon":
                self._muon(
                    group, group.lr * lr_mult, group.momentum if momentum is None else momentum
                )
            else:
                self._adamw(group, group.lr * lr_mult)

    # ownership ------------------------------------------------------------------------------------------------------------

    def _by_shape(self, group: Group) -> list[list[tuple[str, Tensor]]]:
        shapes: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, p in zip(group.names, group.params, strict=True):
            shapes.setdefault(p.shape, []).append((name, p))
        return list(shapes.values())

    def _rows(self, p: Tensor) -> slice | None:
        """The rows of a table that this rank owns; None when it is not dealt out (every rank then does the same update)."""
        if self.world == 1 or p.size(0) % self.world:
            return None
        share = p.size(0) // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    # updates --------------------------------------------------------------------------------------------------------------

    def _muon(self, group: Group, lr: float, momentum: float) -> None:
        for same in self._by_shape(
            group
        ):  # matrices of one shape travel and are orthogonalised together
            share = -(-len(same) // self.world)
            mine = same[self.rank * share : (self.rank + 1) * share]
            grads = self._sum_grads(same, share)[: len(mine)]
            updates = []
            for (name, p), g in zip(mine, grads, strict=True):
                state = group.state.setdefault(name, {})
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(g, 1 - momentum)
                updates.append(torch.lerp(g, state["momentum"], momentum))  # Nesterov
            if mine:
                shape_scale = max(1.0, mine[0][1].size(0) / mine[0][1].size(1)) ** 0.5
                for (_, p), u in zip(mine, self._orthogonalize_all(updates), strict=True):
                    p.mul_(1 - lr * group.weight_decay)
                    p.sub_(u.to(p.dtype), alpha=lr * shape_scale)
            self._share_params(same, share)

    def _orthogonalize_all(self, updates: list[Tensor]) -> Iterable[Tensor]:
        if (
            updates[0].device.type != "cpu"
        ):  # one batched product keeps a GPU busy; a CPU is as fast one by one, in its cache
            return orthogonalize(torch.stack(updates), self.ns_dtype).unbind()
        return [orthogonalize(u, self.ns_dtype) for u in updates]

    def _sum_grads(self, same: list[tuple[str, Tensor]], share: int) -> list[Tensor]:
        """The gradients, summed over the ranks, of the matrices this rank owns."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in same]
        if self.world == 1:
            return grads
        blank = torch.zeros_like(grads[0])
        full = torch.stack(grads + [blank] * (share * self.world - len(grads)))
        own = torch.empty_like(full[:share])
        dist.reduce_scatter_single(own, full)
        return list(own.unbind())

    def _share_params(self, same: list[tuple[str, Tensor]], share: int) -> None:
        if self.world == 1:
            return
        mine = [p for _, p in same[self.rank * share : (self.rank + 1) * share]]
        own = torch.stack(mine + [torch.zeros_like(same[0][1])] * (share - len(mine)))
        full = torch.empty((share * self.world, *own.shape[1:]), dtype=own.dtype, device=own.device)
        dist.all_gather_single(full, own)
        for (_, p), new in zip(same, full, strict=False):
            p.copy_(new)

    def _adamw(self, group: Group, lr: float) -> None:
        params, grads, first, second, steps = [], [], [], [], []
        for name, p in zip(group.names, group.params, strict=True):
            rows = self._rows(p)
            g = torch.zeros_like(p) if p.grad is None else p.grad
            if self.world > 1 and rows is None:
                dist.all_reduce(g)
            elif rows is not None:
                own = torch.empty_like(g[rows])
                dist.reduce_scatter_single(own, g.contiguous())
                g = own
            state = group.state.setdefault(name, {})
            part = p if rows is None else p[rows]
            if not state:
                state["first"], state["second"] = torch.zeros_like(part), torch.zeros_like(part)
            params.append(part)
            grads.append(g)
            first.append(state["first"])
            second.append(state["second"])
            steps.append(torch.tensor(float(self.steps - 1), device=p.device))
        beta1, beta2 = group.betas
        adamw(
            params,
            grads,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=group.eps,
            maximize=False,
        )
        for p in group.params:
            if (rows := self._rows(p)) is not None:
                dist.all_gather_single(p.data, p.data[rows].clone())

    # state ----------------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """
        The whole state as {name/moment: tensor of the parameter's shape}, gathered from all ranks: every rank must call it.
        """
        out: dict[str, Tensor] = {}
        for group in self.groups:
            for same in self._by_shape(group):
                share = -(-len(same) // self.world)
                for at, (name, p) in enumerate(same):
                    for moment in (
                        ("momentum",) if group.optimizer == "muon" else ("first", "second")
                    ):
                        own = group.state.get(name, {}).get(moment)
                        full = torch.zeros_like(p) if own is None else own
                        if self.world > 1 and group.optimizer == "muon":
                            full = full.clone()
                            dist.broadcast(full, src=at // share)
                        elif self.world > 1 and (rows := self._rows(p)) is not None:
                            full = torch.zeros_like(p)
                            dist.all_gather_single(
                                full, torch.zeros_like(p[rows]) if own is None else own
                            )
                        out[f"{name}/{moment}"] = full
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take this rank's part of what state_tensors gave; `tensors` may be a lazy mapping. KeyError when a parameter is missing."""
        self.steps = steps
        for group in self.groups:
            for same in self._by_shape(group):
                share = -(-len(same) // self.world)
                for at, (name, p) in enumerate(same):
                    if group.optimizer == "muon":
                        if at // share == self.rank:
                            group.state[name] = {
                                "momentum": tensors[f"{name}/momentum"].to(
                                    p.device, torch.float32, copy=True
                                )
                            }
                    else:
                        rows = self._rows(p)
                        group.state[name] = {
                            m: (t if rows is None else t[rows]).to(
                                p.device, torch.float32, copy=True
                            )
                            for m, t in ((m, tensors[f"{name}/{m}"]) for m in ("first", "second"))
                        }
