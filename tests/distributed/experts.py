"""A model with DeepSpeed's MoE layer, whose experts differ, and how the tests of experts start, feed and look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.sharding.binding import experts_of
from tests.settings import Setting

from .harness import device
from .losses import STEPS, mean_over_ranks
from .small_runs import small_buffers

WIDTH, INNER, WORDS, EXPERTS = 12, (20, 16), 24, 6
"""Three experts of two expert-parallel ranks, of which two ranks that share them cut the second one's middle matrix."""
Weights = dict[str, Tensor]


class MoENet(nn.Module):
    """An embedding (24, 12), a dense layer (12, 12), six experts of (20, 12), (16, 20), (12, 16) with biases, a head.

    ep: expert parallelism. rank: of the job, which has 6 / ep experts from (rank % ep) * 6 / ep.
    """

    def __init__(self, ep: int, rank: int = 0, *, seed: int = 0) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        first, second = INNER
        expert = nn.Sequential(
            nn.Linear(WIDTH, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, WIDTH)
        )
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(
            WIDTH, expert, num_experts=EXPERTS, ep_size=ep, k=1, capacity_factor=2.0, min_capacity=0, use_rts=False
        )
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        here = rank % ep * (EXPERTS // ep)
        with torch.no_grad():
            for number, (name, p) in enumerate(self.named_parameters()):
                generator = torch.Generator().manual_seed(1000 * seed + place_of(name, number, here))
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        x = self.dense(self.embed(words))
        out, balance, _ = self.moe(x)
        logits = self.head(x + out).flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), targets.flatten()) + 0.01 * balance


def place_of(name: str, number: int, first: int) -> int:
    """A number that is a parameter's own, an expert's among those of all ranks; first: of the experts here."""
    _, found, after = name.partition("deepspeed_experts.")
    if not found:
        return number
    local, _, rest = after.partition(".")
    return 100 * (1 + first + int(local)) + 2 * int(rest[0]) + rest.endswith("bias")


def given(model: nn.Module, rank: int, ep: int, step: int) -> Weights:
    """Normal gradients of full mantissas: the same of a dense parameter on all ranks, of an expert wherever it is."""
    first = rank % ep * (EXPERTS // ep)
    found = {}
    for number, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(10_007 * (step + 1) + place_of(name, number, first))
        found[name] = torch.randn(tuple(p.shape), generator=generator)
    return found


def json_of(stage: int, world_size: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **small_buffers(stage), **more.pop("zero", {})}
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "zero_optimization": zero, **more}
    return {**config, "bf16": {"enabled": True}} if dtype == "bf16" else config


def start(
    stage: int, rank: int, world_size: int, ep: int, optimizer: Mapping[str, Any], *, seed: int = 0, **more: Any
) -> Any:
    """An engine: by ``ds_optim.initialize``, for torch's AdamW by DeepSpeed's in DeepSpeed's own groups."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    config = json_of(stage, world_size, **more)
    model = MoENet(ep, rank, seed=seed).to(device())
    model = model.bfloat16() if "bf16" in config else model
    if optimizer["type"] != "AdamW":
        return ds_optim.initialize(model=model, config={**config, "optimizer": dict(optimizer)})[0]
    from deepspeed.moe.utils import configure_moe_param_groups

    groups = configure_moe_param_groups(list(model.parameters()))
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    built = torch.optim.AdamW(groups, **optimizer["params"])
    return deepspeed.initialize(model=model, optimizer=built, config=config)[0]


def one_step(engine: Any, step: int, rank: int, *, words: int = WORDS) -> float:
    """On a batch of the rank's own, of so many different words; its loss."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, words, (4, 8), generator=generator)
    loss = engine(tokens.to(device()), ((7 * tokens + 3) % WORDS).to(device()))
    engine.backward(loss)
    engine.step()
    return float(loss)


def feed(optimizer: ZeroOptimizer, gradients: Sequence[Weights]) -> None:
    """Put these, step by step, in the place of the gradients that DeepSpeed made."""
    seen: dict[int, int] = {}

    def replace(stepped: torch.optim.Optimizer, *_: Any) -> None:
        binding = optimizer.layout_now()
        for number in dict.fromkeys(binding.unit_of(t) for g in stepped.param_groups for t in g["params"]):
            assert number is not None
            step, unit = seen.get(number, 0), binding.layout.units[number]
            seen[number] = step + 1
            for held in unit.slices(binding.comm_of(number).rank):
                values = gradients[step][unit.params[held.param].name].reshape(-1)[held.start : held.start + held.numel]
                into = binding.tensors[number][held.tensor].grad
                assert into is not None
                into.view(-1)[held.offset : held.offset + held.numel].copy_(values)

    optimizer.register_step_pre_hook(replace)


def weights_of(engine: Any) -> Weights:
    return {name: p.detach().clone().cpu() for name, p in engine.module.named_parameters()}


def is_expert(parameter: nn.Parameter) -> bool:
    return experts_of(parameter) is not None


PARAMS: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.0},
    "LionMuon": {"lr": 0.1, "polar": {"dtype": "float32"}},
}


def losses_of(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """Twenty losses of a row of tests/settings.py, experts over two ranks."""
    engine = start(stage, rank, world_size, 2, {"type": type, "params": PARAMS[type]}, **setting.config)
    losses = [mean_over_ranks(torch.tensor(one_step(engine, 0, rank))) for _ in range(STEPS)]
    engine.destroy()
    return losses
