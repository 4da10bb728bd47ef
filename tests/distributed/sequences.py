"""Small transformers whose sequences are cut among ranks, as ALST does it with DeepSpeed's ``mpu``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optim
from tests.settings import Setting

from .losses import PARAMS, STEPS
from .small_runs import quiet, small_buffers

LENGTH = 16
"""Tokens of a sequence."""
SEQUENCES = 4
"""A step, over all ranks."""
VOCABULARY = 64


def new_model(family: str = "Llama") -> nn.Module:
    """Two layers of 32, four heads over two of keys and values."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def groups_of(sequence: int) -> Any:
    """DeepSpeed's ``mpu`` where ``sequence`` ranks share a sequence, without a model; once in a process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(sequence)
    return parallel_state_sp


def mpu_of(model: nn.Module, sequence: int) -> Any:
    """The same by ALST's attention, which then stands in transformers' place; None for 1, once in a process."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=sequence,
        micro_batch_size=SEQUENCES * sequence // dist.get_world_size(),
        seq_length=LENGTH,
        seq_length_is_variable=False,
    )


def json_of(stage: int, sequence: int, world_size: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **small_buffers(stage), **more.pop("zero_optimization", {})}
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES * sequence // world_size,
        "gradient_clipping": 0.0,
        "sequence_parallel_size": sequence,
        **more,
        "zero_optimization": zero,
    }


def start(
    stage: int,
    sequence: int,
    world_size: int,
    optimizer: Mapping[str, Any],
    mpu: Any = None,
    family: str = "Llama",
    **more: Any,
) -> Any:
    """An engine of a model in its config's dtype; mpu: of an earlier engine of the process."""
    import deepspeed

    quiet()
    model = new_model(family)
    if "bf16" in more:
        model = model.bfloat16()
    mpu = mpu or mpu_of(model, sequence)
    config = json_of(stage, sequence, world_size, **more)
    if optimizer["type"] == "AdamW":
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        torchs = torch.optim.AdamW(model.parameters(), **optimizer["params"])
        return deepspeed.initialize(model=model, optimizer=torchs, config=config, mpu=mpu)[0]
    return ds_optim.initialize(model=model, config={**config, "optimizer": dict(optimizer)}, mpu=mpu)[0]


def one_step(engine: Any, step: int, sequence: int, rank: int, world_size: int) -> float:
    """A step on this rank's part of its sequences; the mean loss of all tokens.

    What ALST's all-gather of losses gives: each part's mean by its share of the tokens, whose gradient is that of
    ``sequence`` times the mean, as all ranks that share a sequence hand it to the others.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    mine, part = rank // sequence, rank % sequence
    tokens = tokens.chunk(world_size // sequence)[mine]
    targets = F.pad(tokens, (0, 1), value=-100)[:, 1:]
    places = torch.arange(LENGTH).expand_as(tokens)
    x, y, at = (t.chunk(sequence, dim=1)[part] for t in (tokens, targets, places))
    logits: Tensor = engine(input_ids=x, position_ids=at, use_cache=False).logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
    loss = total * sequence / (targets != -100).sum()
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone().reshape(1)
    dist.all_reduce(mean)
    return float(mean) / world_size


def losses(rank: int, world_size: int, setting: Setting, stage: int, type: str, steps: int = STEPS) -> list[float]:
    """The loss of every step on one batch: a row of tests/settings.py."""
    return train(rank, world_size, dict(setting.config), stage, type, steps)


_mpus: dict[int, Any] = {}


def train(
    rank: int, world_size: int, config: Mapping[str, Any], stage: int, type: str, steps: int, family: str = "Llama"
) -> list[float]:
    more = dict(config)
    sequence = more.pop("sequence_parallel_size", 1)
    engine = start(
        stage, sequence, world_size, {"type": type, "params": PARAMS[type]}, _mpus.get(sequence), family, **more
    )
    _mpus[sequence] = engine.mpu
    found = [one_step(engine, 0, sequence, rank, world_size) for _ in range(steps)]
    engine.destroy()
    return found
