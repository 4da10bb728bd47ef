"""DeepSpeed's AutoEP: it replaces a model's experts while it builds an engine, and at stage 3 too it shards them over
fewer ranks than the rest.

DeepSpeed 0.19.8 replaces those of some models of transformers 5.24 alone: DeepSeek's, and not Qwen3's or Mixtral's.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from tests.settings import Setting

from .experts import Weights, feed, is_expert
from .harness import assert_all_raised, device, run_ranks
from .losses import STEPS, mean_over_ranks
from .small_runs import differences, small_buffers, snapshot

pytestmark = pytest.mark.full
transformers = pytest.importorskip("transformers")
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
PARAMS = {
    "LionMuon": {"lr": 0.03, **FP32},
    "LASM": {"lr": 1e-2},
    "AdamW": {"lr": 1e-2, "torch_adam": True},
    "int8": {"lr": 1e-2, "momentum_dtype": "int8", **FP32},
}
WORDS, FED = 48, 3


def tiny(kind: str = "DeepseekV3") -> nn.Module:
    """Two layers with four experts, two of them to a word."""
    sizes = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"moe_intermediate_size": 20, "intermediate_size": 20, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    if kind == "DeepseekV3":
        sizes |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16}
        sizes |= {"q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    else:
        sizes |= {"num_experts": 4, "head_dim": 8}
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    return model


def config_of(stage: int, type: str, preset: str = "deepseek_v3", **more: Any) -> dict[str, Any]:
    experts = {"enabled": True, "autoep_size": 2, "preset_model": preset, "use_grouped_mm": False}
    params = PARAMS["int8"] if type == "int8" else PARAMS[type]
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **small_buffers(stage), **more.pop("zero", {})},
        "expert_parallel": experts,
        "optimizer": {"type": {"int8": "LionMuon"}.get(type, type), "params": dict(params)},
        **more,
    }


def start(stage: int, type: str, seed: int = 0, **more: Any) -> Any:
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    model = tiny().to(device())
    if seed:
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
    config = config_of(stage, type, **more)
    return ds_optim.initialize(model=model, config=config)[0]


def one_step(engine: Any, step: int, rank: int) -> float:
    generator = torch.Generator().manual_seed(100 * step + rank)
    words = torch.randint(0, 8, (2, 12), generator=generator).to(device())
    loss = engine(input_ids=words, labels=words).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def whole(engine: Any) -> Weights:
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p] if hasattr(p, "ds_tensor") else []):
            found[name] = p.detach().clone().cpu()
    return found


def given(model: nn.Module, rank: int, step: int) -> Weights:
    found = {}
    for name, p in model.named_parameters():
        seed = zlib.crc32(name.encode()) + 7919 * step + (10_007 * (rank % 2) if is_expert(p) else 0)
        shape = tuple(getattr(p, "ds_shape", p.shape))
        found[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return found


def fed(rank: int, world_size: int, stages: list[int], type: str) -> dict[int, Weights]:
    """The weights that each stage reaches on given gradients, of the model as this rank has it."""
    found = {}
    for stage in stages:
        engine = start(stage, type)
        feed(engine.basic_optimizer, [given(engine.module, rank, step) for step in range(FED)])
        for step in range(FED):
            one_step(engine, step, rank)
        found[stage] = whole(engine)
        engine.destroy()
    return found


@pytest.mark.parametrize(("type", "stages"), [("LionMuon", [0, 3]), ("LASM", [0, 1, 2, 3])])
def test_same_gradients_give_the_same_bits(type: str, stages: list[int]) -> None:
    """As at stage 0, where each rank steps whole tensors: two ranks to an expert, four to the rest."""
    found = run_ranks(4, fed, stages, type)
    for own in found:
        for stage in stages[1:]:
            assert [key for key, v in own[0].items() if not torch.equal(v, own[stage][key])] == [], stage
    experts = [key for key in found[0][0] if ".experts." in key]
    assert len(experts) == 6
    assert all(not torch.equal(found[0][3][key], found[1][3][key]) for key in experts)
    assert all(torch.equal(found[0][3][key], found[2][3][key]) for key in found[0][3])


def saved_and_loaded(rank: int, world_size: int, stage: int, folder: Path) -> dict[str, list[str]]:
    engine = start(stage, "int8")
    for step in range(2):
        one_step(engine, step, rank)
    engine.save_checkpoint(str(folder))
    before = snapshot(engine)
    one_step(engine, 2, rank)
    after = snapshot(engine)
    engine.destroy()
    resumed = start(stage, "int8", seed=1)
    ds_optim.load_checkpoint(resumed, folder)
    loaded = differences(before, snapshot(resumed))
    one_step(resumed, 2, rank)
    return {"loaded": loaded, "went on": differences(after, snapshot(resumed))}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(stage: int, tmp_path: Path) -> None:
    assert run_ranks(4, saved_and_loaded, stage, tmp_path) == [{"loaded": [], "went on": []}] * 4


def losses_of(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """Twenty losses of a row of tests/settings.py."""
    engine = start(stage, type, **setting.config)
    losses = [mean_over_ranks(torch.tensor(one_step(engine, 0, rank))) for _ in range(STEPS)]
    engine.destroy()
    return losses


# -------------------------------------------------------------------------------------------------- bad input


def built_before(rank: int, world_size: int, way: str) -> None:
    import deepspeed

    model, config = tiny(), config_of(3, "LionMuon")
    if way == "from_config":
        ds_optim.from_config(model, config)
    del config["optimizer"]
    optimizer = ds_optim.Lion(ds_optim.param_groups(model))
    if way == "ds_optim":
        ds_optim.initialize(model=model, optimizer=optimizer, config=config)
    deepspeed.initialize(model=model, optimizer=optimizer, config={**config, "zero_allow_untested_optimizer": True})


@pytest.mark.parametrize("way", ["from_config", "ds_optim", "deepspeed"])
def test_an_optimizer_that_was_built_before_is_refused(way: str) -> None:
    outcomes = run_ranks(2, built_before, way, expect_error=True)
    assert_all_raised(outcomes, "UserError", "puts other parameters in the place of the experts", "ds_optim.initialize")


def of_qwen3(rank: int, world_size: int) -> None:
    import deepspeed

    deepspeed.initialize(model=tiny("Qwen3Moe"), config=config_of(2, "AdamW", preset="qwen3_moe"))


def test_deepspeed_itself_does_not_replace_qwen3s_experts() -> None:
    outcomes = run_ranks(2, of_qwen3, expect_error=True)
    assert_all_raised(outcomes, "TypeError", "_CanRecordRegistry.get() takes 2 positional arguments but 3 were given")
