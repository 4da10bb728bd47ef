"""What an estimate says that a rank will hold, against what is counted on DeepSpeed's engines."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import ds_optim
from ds_optim.job.models import build_model, preset_config
from ds_optim.memory import account
from ds_optim.memory.account import MemoryAccount
from ds_optim.memory.estimate import MemoryEstimate, estimate
from ds_optim.memory.estimate_model import ModelShape, shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings

from . import experts
from .commands import MODELS as SMALL
from .harness import run_ranks

pytestmark = pytest.mark.full

BUCKET = 20_000
PERSISTENT = 100
TOKENS = 32
ALLOWED = 0.02
MODELS = ("qwen3-tiny", "gpt2-tied")
ODD = "qwen3 of 265 words"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: ``config`` goes beside DeepSpeed's other settings, ``zero`` into ``zero_optimization``."""

    model: str
    optimizer: str
    stage: int
    momentum_dtype: str = "float32"
    params: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    accumulation: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        params = dict(self.params)
        if self.momentum_dtype != "float32":
            params["momentum_dtype"] = self.momentum_dtype
        if self.optimizer == "adamw":
            params["torch_adam"] = True  # DeepSpeed's own AdamW for the CPU is compiled at first use
        zero = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": {"enabled": self.dtype == "bf16"},
            "optimizer": {"type": self.optimizer, "params": params},
            "zero_optimization": {**zero, **self.zero},
            **self.config,
        }


OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion"},
    "lion_muon": {"optimizer": "lion_muon", "params": {"polar": {"dtype": "bfloat16", "steps": 1}}},
    "lion-int8": {"optimizer": "lion", "momentum_dtype": "int8"},
}
FP32_GRADIENTS = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}, "settings": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "settings": {"offload": True}}
ROUND_ROBIN = {"zero": {"round_robin_gradients": True}, "settings": {"round_robin": True}}
AUTOCAST = {
    "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "settings": {"autocast": True},
    "params": {"polar": {"dtype": "bfloat16", "steps": 1}},
}
HPZ = {"zero": {"zero_hpz_partition_size": 2}, "settings": {"hpz": 2}}
SUB_GROUPS = {"zero": {"sub_group_size": 9_000}, "settings": {"sub_group_size": 9_000}}

CASES = {
    f"{model} z{stage} {name}": Case(model=model, stage=stage, **optimizer)
    for model in MODELS
    for stage in (0, 1, 2, 3)
    for name, optimizer in OPTIMIZERS.items()
}
# What keeps values for rows of matrices beside those of elements.
BY_ROW = {"optimizer": "nor_muon", "params": {"polar": {"dtype": "bfloat16", "steps": 1}}}
CASES |= {f"{MODELS[1]} z{stage} nor_muon": Case(model=MODELS[1], stage=stage, **BY_ROW) for stage in (0, 2, 3)}
CASES |= {f"{MODELS[1]} z3 dion2": Case(model=MODELS[1], stage=3, **{**BY_ROW, "optimizer": "dion2"})}
# What changes the buffers that DeepSpeed makes; at two ranks.
OTHERS = {
    **{f"fp32 z{s}": Case(model=MODELS[1], optimizer="lion", stage=s, dtype="fp32") for s in (0, 1, 3)},
    **{f"fp32 gradients z{s}": Case(model=MODELS[1], optimizer="lion", stage=s, **FP32_GRADIENTS) for s in (1, 2, 3)},
    **{f"offload z{s}": Case(model=MODELS[1], optimizer="lion", stage=s, **OFFLOAD) for s in (2, 3)},
    **{f"offload x2 z{s}": Case(model=MODELS[1], optimizer="lion", stage=s, accumulation=2, **OFFLOAD) for s in (1, 2)},
    **{
        f"round robin z{s}": Case(model=MODELS[1], optimizer="lion_muon", stage=s, momentum_dtype="int8", **ROUND_ROBIN)
        for s in (1, 2)
    },
    "sub-groups": Case(model=MODELS[1], optimizer="lion", stage=3, momentum_dtype="int8", **SUB_GROUPS),
    **{f"accumulation z{s}": Case(model=MODELS[1], optimizer="lion", stage=s, accumulation=2) for s in (1, 2, 3)},
    **{
        f"autocast z{s}": Case(model=MODELS[1], optimizer="lion_muon", stage=s, dtype="fp32", **AUTOCAST)
        for s in (0, 1, 2, 3)
    },
    # Last: once DeepSpeed has made its groups, every later engine of the process keeps a second copy.
    "hpZ": Case(model=MODELS[1], optimizer="lion", stage=3, **HPZ),
}


def new_model(name: str) -> torch.nn.Module:
    from transformers import AutoConfig, GPT2Config

    if name in SMALL or name == ODD:
        config = {**SMALL["qwen3"], "vocab_size": 265} if name == ODD else dict(SMALL[name])
        return build_model(AutoConfig.for_model(config.pop("model_type"), **config), 0)
    if name == "qwen3-tiny":
        return build_model(preset_config(name, 256, TOKENS), 0)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 211, "n_positions": TOKENS}
    return build_model(GPT2Config(**shape, tie_word_embeddings=True, use_cache=False), 0)


@cache
def shape_of(name: str) -> ModelShape:
    with torch.device("meta"):
        return shape_of_module(name, new_model(name))


@dataclass
class Seen:
    """Counts on one rank: before the step, between micro-batches if there are several, in the forward pass, and of what
    offload leaves on the host."""

    before_step: MemoryAccount
    between: MemoryAccount
    forward: MemoryAccount
    host: int


def count_all(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Seen]:
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    gc.freeze()
    return {name: count(case) for name, case in cases.items()}


def count(case: Case) -> Seen:
    """One step makes the optimizer's state, and ZeRO-3's record of which layer comes when; the next is counted."""
    engine, *_ = ds_optim.initialize(model=new_model(case.model), config=case.json())
    tokens = torch.arange(TOKENS).view(1, -1)
    forward, backward = [], []
    for micro in range(2 * case.accumulation):
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        forward.append(account(engine))
        engine.backward(loss)
        del loss
        backward.append(account(engine))
        if micro < 2 * case.accumulation - 1:
            engine.step()
    host = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in on_host(engine.optimizer)}.values())
    engine.destroy()
    return Seen(before_step=backward[-1], between=backward[-case.accumulation], forward=forward[-1], host=host)


#: What DeepSpeed's wrappers keep on the host under offload, the partitions' gradients and the optimizer's state aside.
PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
BUFFERS = ("param_buffer_of_bit16_for_cpu_offload_groups", "temp_grad_buffer_for_cpu_offload")
BUFFERS += ("accumulated_grads_in_cpu", "grad_partitions_flat_buffer")


def on_host(wrapper: Any) -> Iterator[torch.Tensor]:
    partitions = [partition for name in PARTITIONS for partition in getattr(wrapper, name, [])]
    states = [wrapper.optimizer.state[partition] for partition in partitions if partition in wrapper.optimizer.state]
    yield from partitions
    yield from (partition.grad for partition in partitions if partition.grad is not None)
    yield from (value for state in states for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
    buffers = [getattr(wrapper, name, ()) for name in BUFFERS]
    yield from (each for each in tree_leaves([list(b.values()) if isinstance(b, dict) else b for b in buffers]))


@cache
def counted(world_size: int) -> dict[str, list[Seen]]:
    """For each case what every rank counted."""
    cases = CASES | OTHERS if world_size == 2 else CASES
    ranks = run_ranks(world_size, count_all, cases, timeout=200)
    return {name: [rank[name] for rank in ranks] for name in cases}


def estimated(case: Case, world_size: int, held: ModelShape | None = None) -> MemoryEstimate:
    """held: what one rank has of a model that is cut before."""
    model = held or shape_of(case.model)
    plan = plan_optimizer(
        model,
        case.optimizer,
        case.params,
        momentum_dtype=case.momentum_dtype,
        weights=TORCH_DTYPES[case.dtype],
        device="cpu",
    )
    zero = ZeroSettings(
        stage=case.stage,
        ranks=world_size,
        dtype=case.dtype,
        accumulation=case.accumulation,
        reduce_bucket_size=BUCKET,
        prefetch_bucket_size=BUCKET,
        param_persistence_threshold=PERSISTENT,
        device="cpu",
        **case.settings,
    )
    return estimate(model, plan, zero)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_model_states_are_within_two_percent(name: str, world_size: int) -> None:
    case = CASES[name]
    guessed = estimated(case, world_size)
    for seen, rank in zip(counted(world_size)[name], guessed.ranks, strict=True):
        held = seen.before_step
        assert rank.model_states == pytest.approx(held.model_state_bytes, rel=ALLOWED)
        assert rank.weights == held.weights
        assert rank.master == held.master
        assert rank.gradients == pytest.approx(held.gradients, abs=64), "but for a gradient norm"
        kept = dict(held.state)
        if case.momentum_dtype == "int8":  # a vector's one scale is counted among the scalars
            kept["exp_avg_scale"] += held.scalars
        else:
            assert rank.scalars == held.scalars
        assert rank.state == kept
        assert rank.padding == held.state_padding + held.master_padding


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_to_the_byte(name: str) -> None:
    case = OTHERS[name]
    guessed = estimated(case, 2)
    for seen, rank in zip(counted(2)[name], guessed.ranks, strict=True):
        held = seen.before_step
        assert rank.model_states == pytest.approx(held.model_state_bytes, abs=1024)
        assert rank.gradients == pytest.approx(held.gradients, abs=512)
        between = seen.between.gradients
        assert rank.gradients + rank.accumulating == pytest.approx(max(between, held.gradients), abs=512)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("offload")])
def test_what_offload_leaves_on_the_host_to_the_byte(name: str) -> None:
    """Masters, state, the step's gradients and the buffers that DeepSpeed pins: of a rank, and of a node of both."""
    guessed = estimated(OTHERS[name], 2)
    held = [seen.host for seen in counted(2)[name]]
    assert [rank.on_host for rank in guessed.ranks] == held
    assert guessed.host_of_node(2) == guessed.host_of_node(8) == sum(held)
    assert guessed.host_of_node(1) == max(held)


def test_autocast_has_a_bucket_for_each_dtype_on_the_wire() -> None:
    plain, autocast = (counted(2)[f"{name} z3"][0].before_step.buckets for name in ("fp32", "autocast"))
    guessed = [estimated(OTHERS[f"{name} z3"], 2).ranks[0].buckets for name in ("fp32", "autocast")]
    assert autocast - plain == guessed[1] - guessed[0] == BUCKET * 2


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_stage_3_gathers_what_is_said(model: str, world_size: int) -> None:
    """Models of less than half ``max_reuse_distance`` stay whole until backward, the bucket all the time."""
    name = f"{model} z3 lion"
    guessed = estimated(CASES[name], world_size)
    for seen, rank in zip(counted(world_size)[name], guessed.ranks, strict=True):
        assert rank.weights + rank.gathered == pytest.approx(seen.forward.weights, rel=ALLOWED)
        assert seen.before_step.buckets == BUCKET * 2 < rank.buckets


# ------------------------------------------------------------------------------- models that are cut before ZeRO's cut

CUT: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "AutoTP": ("qwen3", {"tensor_parallel": {"autotp_size": 2}}, (2, 1)),
    "AutoEP": (
        "deepseek",
        {
            "expert_parallel": {
                "enabled": True,
                "autoep_size": 2,
                "preset_model": "deepseek_v3",
                "use_grouped_mm": False,
            }
        },
        (1, 2),
    ),
}
INT8 = {"optimizer": "lion_muon", "momentum_dtype": "int8", "params": {"polar": {"dtype": "bfloat16", "steps": 1}}}
BOTH = [OPTIMIZERS["adamw"], INT8]
CUT_CASES = [
    (what, Case(model=CUT[what][0], stage=stage, config=CUT[what][1], **optimizer))
    for what in CUT
    for stage, optimizers in ((0, BOTH), (1, [INT8]), (2, BOTH), (3, BOTH))
    for optimizer in optimizers
]
CUT_CASES.insert(0, ("AutoTP", Case(model=ODD, stage=2, config=CUT["AutoTP"][1], **INT8)))


@cache
def counted_cut() -> list[list[Seen]]:
    """By case what each of four ranks counted; AutoTP last, which stays with a process."""
    by_case: list[list[Seen]] = []
    for what in CUT:
        cases = {str(n): case for n, (kind, case) in enumerate(CUT_CASES) if kind == what}
        ranks = run_ranks(4, count_all, cases, timeout=200)
        by_case += [[rank[name] for rank in ranks] for name in cases]
    return by_case


@pytest.mark.parametrize(
    "number", range(len(CUT_CASES)), ids=lambda n: f"{CUT_CASES[n][0]} z{CUT_CASES[n][1].stage} {n}"
)
def test_a_rank_of_a_cut_model_holds_what_is_said(number: int) -> None:
    what, case = CUT_CASES[number]
    tensor, experts = CUT[what][2]
    guessed = estimated(case, 4 // tensor, shape_of(case.model).for_ranks(tensor, experts))
    # DeepSpeed moves AutoEP's routers to the end of its own optimizers' group, where another rank cuts through them.
    slack = 512 if (what, case.optimizer) == ("AutoEP", "adamw") else 64
    for place, seen in enumerate(counted_cut()[number]):
        if case.model == ODD and place % tensor > 0:
            continue  # the first has a word more
        held, rank = seen.before_step, guessed.ranks[place // tensor]
        assert rank.weights == held.weights
        assert rank.master == held.master
        assert rank.gradients == pytest.approx(held.gradients, abs=slack), "but for a gradient norm"
        kept = dict(held.state)
        if case.momentum_dtype == "int8":
            kept["exp_avg_scale"] += held.scalars
        assert rank.state == kept
        assert rank.padding == held.state_padding + held.master_padding


def of_experts(rank: int, world_size: int, stages: list[int], optimizer: dict[str, Any]) -> list[MemoryAccount]:
    """Of DeepSpeed's MoE layer, which is built with what one rank has of the experts."""
    found = []
    for stage in stages:
        engine = experts.start(stage, rank, world_size, 2, optimizer)
        experts.one_step(engine, 0, rank)
        found.append(account(engine))
        engine.destroy()
    return found


@pytest.mark.full
def test_a_rank_of_moe_layers_holds_what_is_said() -> None:
    params: dict[str, Any] = {"polar": {"dtype": "float32", "steps": 1}}
    stages = [0, 2]
    held = run_ranks(4, of_experts, stages, {"type": "LionMuon", "params": {"lr": 1e-3, **params}})
    shape = shape_of_module("moe", experts.MoENet(2))
    plan = plan_optimizer(shape, "lion_muon", params, weights=torch.float32, device="cpu")
    for stage in stages:
        zero = ZeroSettings(stage=stage, ranks=4, dtype="fp32", accumulation=1, device="cpu")
        for seen, rank in zip(
            (own[stages.index(stage)] for own in held), estimate(shape, plan, zero).ranks, strict=True
        ):
            assert (rank.weights, rank.master, rank.state) == (seen.weights, seen.master, dict(seen.state))
            assert rank.padding == seen.state_padding + seen.master_padding
