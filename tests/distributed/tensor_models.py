"""A model that AutoTP cuts, the same cut by hand as Megatron's layers are, and what their ranks hold put together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optim
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.sharding.layout import Shard
from tests.settings import Setting

from .losses import PARAMS, STEPS, mean_over_ranks
from .small_runs import quiet, small_buffers

WORDS, WIDTH = 37, 24
LAYERS = {".*\\.up\\.weight$": "column", ".*\\.query\\.weight$": "column", ".*\\.down\\.weight$": "row"}
"""What is cut along rows of the matrix, and along columns."""


class Block(nn.Module):
    """norm (24,) x 2; up.weight (72, 24), up.bias (72,); down.weight (24, 72), down.bias (24,); query.weight (48, 24);
    mixed.weight (24, 48); whole.weight (24, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.query = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.mixed = nn.ModuleDict({"down": nn.Linear(2 * WIDTH, WIDTH, bias=False)})
        self.whole = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.down(torch.tanh(self.up(y)))
        return x + self.whole(self.mixed["down"](torch.tanh(self.query(y))))


class TensorNet(nn.Module):
    """Next-token model: embed.weight (37, 24), two blocks, head.weight (37, 24)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x).to(torch.promote_types(x.dtype, torch.float32))
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


def autotp(size: int) -> dict[str, Any]:
    """The part of a config that has AutoTP cut the model."""
    specs = [{"patterns": [pattern], "partition_type": kind} for pattern, kind in LAYERS.items()]
    plan = {"use_default_specs": False, "layer_specs": specs}
    return {"tensor_parallel": {"autotp_size": size, "partition_config": plan}}


def shard_of(whole: Tensor, shard: Shard | None, rank: int) -> Tensor:
    """What tensor-parallel rank ``rank`` holds of a parameter."""
    if shard is None:
        return whole
    return torch.cat([whole.narrow(shard.dim, first, size) for first, size in shard.pieces[rank]], dim=shard.dim)


def put_together(shards: list[Tensor], shard: Shard | None) -> Tensor:
    """The parameter that tensor-parallel ranks hold shards of; all must be alike where it is not cut."""
    if shard is None:
        assert all(torch.equal(one, shards[0]) for one in shards)
        return shards[0]
    whole = torch.full(shard.whole, float("nan"))
    for own, pieces in zip(shards, shard.pieces, strict=True):
        begin = 0
        for first, size in pieces:
            whole.narrow(shard.dim, first, size).copy_(own.narrow(shard.dim, begin, size))
            begin += size
    return whole


def give_gradients(optimizer: ZeroOptimizer, gradients: list[Mapping[str, Tensor]]) -> None:
    """Put known gradients into what the optimizer is stepped with, in place of those that were reduced."""
    counts: dict[int, int] = {}

    def replace(_: Any, *__: Any) -> None:
        binding = optimizer.layout_now()
        tensor = 0 if binding.tensor is None else binding.tensor.rank
        for group in optimizer.param_groups:
            for held in group["params"]:
                number = binding.unit_of(held)
                assert number is not None
                step = counts[id(held)] = counts.get(id(held), -1) + 1
                unit = binding.layout.units[number]
                for piece in unit.slices(binding.comm.rank):
                    if binding.sharded or binding.tensors[number][piece.tensor] is held:
                        spec = unit.params[piece.param]
                        own = shard_of(gradients[step][spec.name], spec.shard, tensor).reshape(-1)
                        place = held.grad.view(-1)[piece.offset : piece.offset + piece.numel]
                        place.copy_(own[piece.start : piece.start + piece.numel])

    optimizer.register_step_pre_hook(replace)


def whole_weights(engine: Any, optimizer: ZeroOptimizer) -> dict[str, Tensor]:
    """The model's weights without parallelism; every data-parallel rank must hold the same."""
    import deepspeed

    shards = {m.spec.name: m.spec.shard for group in optimizer.members for m in group}
    parameters = dict(engine.module.named_parameters())
    sharded = any(hasattr(p, "ds_id") for p in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())) if sharded else contextlib.nullcontext():
        own = {name: p.detach().float().clone() for name, p in parameters.items()}
    tensor = optimizer.layout_now().tensor
    ranks = [own] if tensor is None else tensor.gather_objects(own)
    found = {name: put_together([rank[name] for rank in ranks], shards.get(name)) for name in own}
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        assert all(torch.equal(other[name], found[name]) for other in everywhere for name in found)
    return found


# ------------------------------------------------------------------------------------------------ cut by hand


class Mpu:
    """Groups of ``size`` neighbours that hold shards, and of those that hold the same ones, as Megatron names them."""

    def __init__(self, size: int) -> None:
        world = range(dist.get_world_size())
        self._tensor = self._mine([list(world[first : first + size]) for first in world[::size]])
        self._data = self._mine([list(world[first::size]) for first in range(size)])

    @staticmethod
    def _mine(groups: list[list[int]]) -> Any:
        made = [dist.new_group(ranks) for ranks in groups]
        return next(made[number] for number, ranks in enumerate(groups) if dist.get_rank() in ranks)

    def get_tensor_model_parallel_group(self) -> Any:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)


class _Summed(torch.autograd.Function):
    """Sums over shards on the way there, or of gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, backwards: bool) -> Tensor:
        ctx.group = group if backwards else None
        if not backwards:
            x = x.clone()
            dist.all_reduce(x, group=group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.group is not None:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


class HandCut(nn.Module):
    """A linear layer whose weight is cut along ``dim``, with Megatron's marks; a bias that is cut along 0 with it."""

    def __init__(self, whole: nn.Linear, dim: int, mpu: Mpu) -> None:
        super().__init__()
        self.dim, self.group = dim, mpu.get_tensor_model_parallel_group()
        rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(whole.weight.detach().chunk(ranks, dim)[rank].clone())
        self._mark(self.weight, dim)
        self.bias = None
        if whole.bias is not None:
            bias = whole.bias.detach()
            self.bias = nn.Parameter((bias.chunk(ranks)[rank] if dim == 0 else bias).clone())
            if dim == 0:
                self._mark(self.bias, 0)

    @staticmethod
    def _mark(parameter: Any, dim: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 0:
            return F.linear(_Summed.apply(x, self.group, True), self.weight, self.bias)
        y: Tensor = _Summed.apply(F.linear(x, self.weight), self.group, False)
        return y if self.bias is None else y + self.bias


def cut_by_hand(model: TensorNet, mpu: Mpu) -> TensorNet:
    """The model, with the layers that AutoTP cuts cut in place."""
    for block in model.blocks:
        for owner, name, dim in ((block, "up", 0), (block, "query", 0), (block, "down", 1), (block.mixed, "down", 1)):
            whole = owner[name] if isinstance(owner, nn.ModuleDict) else getattr(owner, name)
            cut = HandCut(whole, dim, mpu)
            owner.update({name: cut}) if isinstance(owner, nn.ModuleDict) else setattr(owner, name, cut)
    return model


# ---------------------------------------------------------------------------------------------------- engines

Place = tuple[int, int, int, str]
"""(ranks, tensor-parallel ranks, stage, who cuts: "autotp" or "by hand")."""


def start(
    place: Place, optimizer: Mapping[str, Any] | None, model: TensorNet | None = None, **config: Any
) -> tuple[Any, ZeroOptimizer]:
    """An engine, and what it steps: one of ours, or torch's AdamW where no optimizer is named."""
    quiet()
    given = {**settings(place), **config}
    model = TensorNet() if model is None else model
    mpu = Mpu(place[1]) if place[3] == "by hand" else None
    model = model if mpu is None else cut_by_hand(model, mpu)
    theirs = None
    if optimizer is None:
        theirs = torch.optim.AdamW(model.parameters(), **PARAMS["AdamW"])
        given["zero_allow_untested_optimizer"] = True
    else:
        given["optimizer"] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in optimizer.items()}
    engine, *_ = ds_optim.initialize(model=model, optimizer=theirs, config=given, mpu=mpu)
    return engine, engine.basic_optimizer


def settings(place: Place) -> dict[str, Any]:
    """The config but for the optimizer."""
    _, size, stage, cutter = place
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **small_buffers(stage)},
        **(autotp(size) if cutter == "autotp" else {}),
    }


def one_step(engine: Any, step: int, place: Place) -> float:
    """On the share of this rank's data-parallel group; its tensor-parallel ranks see the same."""
    ranks, size, *_ = place
    noise = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(WORDS, (4 * ranks // size, 5), generator=noise) for _ in range(2))
    own = slice(dist.get_rank() // size, None, ranks // size)
    loss = engine(tokens[own], targets[own])
    engine.backward(loss)
    engine.step()
    return float(loss)


def losses_of_autotp(
    rank: int, world_size: int, setting: Setting, stage: int, type: str, cutter: str = "autotp"
) -> list[float]:
    """The mean loss over all ranks at every step, on one batch, for tests/settings.py."""
    place = (world_size, 2, stage, cutter)
    own = {"type": type, "params": PARAMS[type]} if type != "AdamW" else None
    engine, _ = start(place, own)
    found = [mean_over_ranks(torch.tensor(one_step(engine, 0, place))) for _ in range(STEPS)]
    engine.destroy()
    return found


def losses_by_hand(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """The same of layers that are cut by hand."""
    return losses_of_autotp(rank, world_size, setting, stage, type, "by hand")
