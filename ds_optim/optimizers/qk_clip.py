"""QK-clip: queries and keys shrink where a head's logits grow too large (MuonClip of Kimi K2, arXiv 2507.20534).

A hook behind any optimizer of this package: it scales rows of the fp32 weights right after they were stepped, before
DeepSpeed casts them, wherever slices of them lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.checks import check_beta, check_positive
from ds_optim.optimizers.local import flat, run
from ds_optim.optimizers.qk_rows import projections, scale_rows
from ds_optim.sharding.binding import Binding


class QKClip:
    """With S the largest logit of a head since the last step, over all ranks, and g = min(1, tau / S):
    W_q <- g^alpha W_q and W_k <- g^(1 - alpha) W_k of that head's rows, after the step; biases of theirs too.

    Args:
        optimizer: one of this package's, or the DeepSpeed engine that steps it.
        pairs: {layer: (name of its query weight, name of its key weight)}, or {layer: name of the weight that is both}:
            rows (heads x size) of queries, keys and values. Where they lie is the weight's view, for a Conv1D as well.
        heads: of the queries. key_heads: of the keys, which queries share in equal groups; the same where None. A
            key that several heads share takes the smallest of their g.
        tau: what no logit is to stay above.
        alpha: how much of it the queries take.
        interleaved: in weights that are both, each key follows the queries that share it, and its values follow it, as
            in GPT-NeoX; by default all queries come first, then all keys, then all values, as in GPT-2 and Phi-3.

    The model tells: ``clip.observe("layers.0", logits)`` in the forward pass of every attention, on every rank. Keeps
    no state; a step joins heads x layers maxima (4 bytes each) in one all-reduce.

    Raises:
        UserError: a name that the optimizer does not step, or a weight whose rows are no multiple of the heads.
    """

    def __init__(
        self,
        optimizer: Any,
        pairs: Mapping[str, tuple[str, str] | str],
        heads: int,
        *,
        key_heads: int | None = None,
        tau: float = 100.0,
        alpha: float = 0.5,
        interleaved: bool = False,
    ) -> None:
        while not isinstance(optimizer, ZeroOptimizer) and getattr(optimizer, "optimizer", None) is not None:
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, ZeroOptimizer):
            raise UserError(f"{type(optimizer).__name__} is no optimizer of ds_optim, nor an engine that steps one")
        self._optimizer, self._layers, self._heads = optimizer, list(pairs), heads
        self._key_heads = heads if key_heads is None else key_heads
        self._tau, self._alpha = check_positive("tau", tau), check_beta("alpha", alpha)
        if heads % self._key_heads:
            raise UserError(f"{heads} heads do not share {self._key_heads} keys in equal groups: write a divisor")
        members = {member.spec.name: member for members in optimizer.members for member in members}
        self._parts = projections(pairs, members, heads, self._key_heads, interleaved)
        self._seen: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] | None = None
        self._due: set[int] = set()
        self._skipped = optimizer.skipped_steps
        optimizer.register_step_post_hook(self._after_step)

    def observe(self, layer: str, logits: Tensor) -> None:
        """Take note of a layer's logits (batch, heads, queries, keys), or of each head's largest, (heads,)."""
        if layer not in self._layers:
            raise UserError(f"QKClip: there is no layer {layer!r}; there are {', '.join(self._layers)}")
        values = logits.detach().float()
        largest = values if values.dim() == 1 else values.transpose(0, 1).flatten(1).amax(dim=1)
        if largest.shape != (self._heads,):
            raise UserError(f"QKClip: {layer} has logits of {len(largest)} heads, not {self._heads}")
        self._seen[layer] = largest.maximum(self._seen[layer]) if layer in self._seen else largest

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed calls once for each partition, the same ones on every rank: the first call asks all ranks."""
        skipped, self._skipped = self._optimizer.skipped_steps - self._skipped, self._optimizer.skipped_steps
        if skipped or not self._optimizer.state:  # nothing was stepped
            return
        binding = self._optimizer.layout_now()
        if self._factors is None:
            self._factors = self._asked(binding)
            self._due = set(range(len(binding.layout.units)))
        for number in dict.fromkeys(binding.unit_of(t) for group in optimizer.param_groups for t in group["params"]):
            assert number is not None
            unit = binding.layout.units[number]
            for held in unit.slices(binding.comm_of(number).rank):
                part = self._parts.get(unit.params[held.param].name)
                rows = part.factors(*self._factors[part.layer]) if part is not None else None
                if part is not None and rows is not None and bool((rows < 1).any()):
                    scale_rows(run(flat(binding.tensors[number][held.tensor]), held), held.start, part.view, rows)
            self._due.discard(number)
        if not self._due:
            self._factors, self._seen = None, {}

    def _asked(self, binding: Binding) -> dict[str, tuple[Tensor, Tensor]]:
        """What each head's queries and keys are multiplied with, by layer; 1 where nobody has seen a logit."""
        if binding.tensor is not None:
            raise UserError("QKClip is not supported under tensor parallelism, whose ranks have heads of their own")
        device = binding.peers.device(binding.device)
        none = torch.zeros(self._heads, dtype=torch.float32, device=device)
        largest = torch.stack([self._seen.get(layer, none).to(device) for layer in self._layers])
        found = (self._tau / binding.peers.all_reduce(largest, "max").clamp(min=self._tau)).cpu()
        keys = found.view(len(found), self._key_heads, -1).amin(dim=2)
        return dict(zip(self._layers, zip(found**self._alpha, keys ** (1 - self._alpha), strict=True), strict=True))
