"""What of a model one rank holds before ZeRO cuts it: shards of AutoTP, and experts that AutoEP deals out.

As DeepSpeed 0.19.8 does both, counted on its engines (tests/distributed/test_estimate_accounted.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Shard
from ds_optim.sharding.shards import ShardView
from ds_optim.zero.experts import experts_over
from ds_optim.zero.support import tensor_parallel_size

if TYPE_CHECKING:
    from torch import nn

    from ds_optim.memory.estimate_model import Parameter

#: The dimension of a linear layer's weight that a style of transformers' ``tp_plan`` cuts; of others none is.
_CUT = {"colwise": 0, "colwise_rep": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_rep": 1}
_WHOLE = ("embedding_rowwise", "replicated_with_grad_allreduce", "sequence_parallel")
_COUNT = 4
_STACKS = ("gate_up_proj", "down_proj")


def parallel_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of a DeepSpeed JSON: over how many ranks AutoTP cuts a model, and AutoEP deals out its experts."""
    return tensor_parallel_size(config), experts_over(config)


def held_by_one(
    parameters: Iterable[Parameter], module: nn.Module | None, *, tensor: int, experts: int
) -> tuple[Parameter, ...]:
    """The parameters as one rank of a tensor-parallel group, or of those that share experts, has them.

    Where a vocabulary does not divide, the first rank's are counted, which are the most.

    Raises:
        UserError: what is cut is not known, or it does not divide.
    """
    if tensor > 1 and experts > 1:
        raise UserError("tensor- and expert-parallel ranks together are not supported: write 1 for one of them")
    found = tuple(parameters)
    if tensor > 1:
        plan = _plan_of(module)
        heads = getattr(getattr(module, "config", None), "num_key_value_heads", None)
        if isinstance(heads, int) and heads % tensor:
            raise UserError(
                f"the model has {heads} heads of keys and values, which {tensor} tensor-parallel ranks do not divide: "
                "write a number that does"
            )
        found = tuple(_shard_of(parameter, plan, tensor) for parameter in found)
    if experts > 1:
        found = tuple(_dealt(found, experts))
        if not any(parameter.over > 1 for parameter in found):
            raise UserError(
                "expert-parallel ranks: the model has no stacks of experts that AutoEP replaces "
                f"({' and '.join(_STACKS)}, three dimensions each); write 1"
            )
    return found


def among(experts: str | None) -> int:
    """Over how many ranks a parameter of DeepSpeed's MoE layer is dealt out, by the name of who shares it; 1 of others.

    A model has what one rank holds of them.
    """
    return 1 if experts is None else int(experts.removeprefix("ep_size_"))


def added_bytes(held: Iterable[Parameter]) -> int:
    """Bytes of the buffers that AutoEP's layers have beside what they replace: a count of tokens for each expert."""
    return sum(_COUNT * one.over * one.shape[0] for one in held if one.over > 1 and one.name.endswith(".w1"))


def _plan_of(module: nn.Module | None) -> Mapping[str, str]:
    """transformers' ``tp_plan``, which AutoTP cuts by."""
    plan = getattr(module, "_tp_plan", None)
    if not plan:
        raise UserError(
            "tensor-parallel ranks: how AutoTP cuts this model is not known, as transformers has no tp_plan of it; "
            "write 1, and give --model a list of the shapes that one rank holds and --ranks the data-parallel ranks"
        )
    unknown = sorted({style for style in plan.values() if style not in (*_CUT, *_WHOLE)})
    if unknown:
        raise UserError(f"tensor-parallel ranks: DeepSpeed 0.19 does not cut by {', '.join(unknown)}; write 1")
    return {pattern.replace(".", r"\.").replace("*", r"\d+"): style for pattern, style in plan.items()}


def _shard_of(parameter: Parameter, plan: Mapping[str, str], ranks: int) -> Parameter:
    layer, _, kind = parameter.name.rpartition(".")
    style = next((style for pattern, style in plan.items() if re.fullmatch(pattern, layer)), "")
    dim = _CUT.get(style)
    if dim is None or (dim == 1 and kind == "bias"):
        return parameter
    whole = parameter.shape
    sizes = [whole[dim] // ranks + (rank < whole[dim] % ranks) for rank in range(ranks)]
    if sizes[0] != sizes[-1] and parameter.view is not None:
        raise UserError(
            f"{parameter.name} is {whole}, which {ranks} tensor-parallel ranks do not divide: write a number that does"
        )
    shape = (*whole[:dim], sizes[0], *whole[dim + 1 :])
    shard = Shard(whole=whole, dim=dim, pieces=tuple(((sum(sizes[:r]), size),) for r, size in enumerate(sizes)))
    view = None if parameter.view is None else ShardView.of_whole(parameter.view, shard, shape)
    return replace(parameter, shape=shape, shard=shard, view=view)


def _dealt(parameters: Iterable[Parameter], ranks: int) -> Iterator[Parameter]:
    """Stacks of experts as AutoEP's layers hold them: w1 and w3 (E, inner, width), one in transformers, and w2."""
    stacks: dict[str, Parameter] = {}
    for parameter in parameters:
        layer, _, kind = parameter.name.rpartition(".")
        if kind not in _STACKS or len(parameter.shape) != 3:
            yield parameter
            continue
        stacks[kind] = parameter
        if len(stacks) == len(_STACKS):
            (count, both, width), down = stacks["gate_up_proj"].shape, stacks["down_proj"].shape
            if count % ranks:
                raise UserError(f"{layer} has {count} experts, which {ranks} expert-parallel ranks do not divide")
            shapes = {"w1": (both // 2, width), "w2": down[1:], "w3": (both // 2, width)}
            for name, inner in shapes.items():
                shape = (count // ranks, *inner)
                view = MatrixView(shape=shape, batch_dims=1)
                yield replace(parameter, name=f"{layer}.{name}", shape=shape, view=view, over=ranks)
            stacks = {}
