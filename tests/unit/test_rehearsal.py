"""Passes that are counted on shapes, against those of the same model on a CPU, and what they become beside ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.job.models import build_model
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_passes import FORMULA, Batch, ModelPasses, by_formula
from ds_optim.memory.losses import liger_piece, losses
from ds_optim.memory.passes import Backward, Moment, Passes, extrapolated
from ds_optim.memory.rehearsal import COUNTED, rehearse
from ds_optim.memory.tracker import TensorTracker
from tests.tiers import cells
from tests.unit.zoo import model_of

#: Of norms' statistics, which a CPU keeps in bf16 and shapes in fp32.
ALLOWED = 0.005
BF16 = torch.bfloat16
WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
EXPERTS |= {"n_group": 1, "topk_group": 1}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**WIDTHS, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    "llama": {**WIDTHS, "num_key_value_heads": 4, "intermediate_size": 96},
    "mixtral": {**WIDTHS, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4},
    "deepseek_v3": {
        **WIDTHS,
        **LATENT,
        **EXPERTS,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
    },
}
#: The model, whether layers are checkpointed, the micro-batch, the sequence.
CASES = cells(
    default=[("gpt2", False, 1, 48), ("mixtral", True, 2, 48)],
    full=[(name, often, 3, 160) for name in MODELS for often in (False, True)]
    + [(name, False, 1, 48) for name in MODELS],
)


def new(name: str, device: str = "cpu", **changed: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **{**MODELS[name], **changed}, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.device(device):
        return build_model(config, 0)


@cache
def on_shapes(name: str) -> Any:
    return new(name, "meta")


def measured(
    name: str, checkpointing: bool, micro_batch: int, seq_len: int, loss: Callable[[Any, Tensor], Tensor] = losses
) -> tuple[int, int]:
    """What a forward pass keeps, and the most at once, without gradients that are complete."""
    model = new(name).to(BF16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        # ALST's pieces say which of them is the last.
        parameter.register_post_accumulate_grad_hook(
            lambda p: setattr(p, "grad", None) if getattr(p, "ds_grad_is_ready", True) else None
        )
    windows = torch.randint(0, 300, (micro_batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    with TensorTracker() as tracker:
        mean = loss(model, windows).mean()
        kept = tracker.live_bytes - tracker.base_bytes
        mean.backward()
        return kept, tracker.peak_bytes - tracker.base_bytes


@pytest.mark.parametrize(("name", "checkpointing", "micro_batch", "seq_len"), CASES)
def test_shapes_hold_what_values_hold(name: str, checkpointing: bool, micro_batch: int, seq_len: int) -> None:
    shape = {"micro_batch": micro_batch, "seq_len": seq_len, "checkpointing": checkpointing}
    found = rehearse(on_shapes(name), **shape, dtype=BF16, device="cpu")
    kept, most = measured(name, checkpointing, micro_batch, seq_len)
    assert found.kept == pytest.approx(kept, rel=ALLOWED)
    assert found.most == pytest.approx(most, rel=ALLOWED)
    assert found.elements == sum(p.numel() for p in on_shapes(name).parameters() if p.requires_grad)


def test_a_loss_in_chunks_holds_the_logits_of_one() -> None:
    whole, chunked = (
        rehearse(on_shapes("llama"), micro_batch=2, seq_len=160, dtype=BF16, loss_chunks=n, device="cpu")
        for n in (1, 8)
    )
    kept, most = measured("llama", False, 2, 160, partial(losses, chunks=8))
    assert (chunked.kept, chunked.most) == (pytest.approx(kept, rel=ALLOWED), pytest.approx(most, rel=ALLOWED))
    of_logits = [max(moment.logits for moment in passes.moments) for passes in (whole, chunked)]
    assert of_logits[0] == pytest.approx(8 * of_logits[1], rel=0.01)
    draws = torch.randint(0, 300, (2, 33))
    model = new("llama")
    assert torch.allclose(losses(model, draws), losses(model, draws, 4), atol=1e-5)


@pytest.mark.full
def test_as_many_chunks_hold_what_shards_of_alst_do() -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def of_shard(model: Any, states: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(states).float(), targets)

    def alst(model: Any, windows: Tensor) -> Any:
        states = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
        return TiledFusedLogitsLoss.apply(
            of_shard, model, states, windows[:, 1:], None, 4, [model.lm_head.weight], "mean"
        )

    found = rehearse(on_shapes("llama"), micro_batch=2, seq_len=160, dtype=BF16, loss_chunks=4, device="cpu")
    kept, most = measured("llama", False, 2, 160, alst)
    assert (found.kept, found.most) == (pytest.approx(kept, rel=0.01), pytest.approx(most, rel=0.01))


#: By vocabulary, micro-batch and sequence: pieces, and the peak of liger-kernel 0.8.5 on a CPU, in Triton's
#: interpreter, which keeps the last piece's logits.
LIGER = {(300, 2, 160): (5, 2033928), (1000, 2, 128): (16, 1912320), (4000, 1, 256): (32, 3486464)}


@pytest.mark.parametrize("shape", cells(default=[(1000, 2, 128)], full=list(LIGER)))
def test_ligers_loss_holds_what_it_was_measured_to(shape: tuple[int, int, int]) -> None:
    vocabulary, micro_batch, seq_len = shape
    pieces, most = LIGER[shape]
    tokens = micro_batch * seq_len
    piece = liger_piece(tokens, 64, vocabulary)
    assert -(-tokens // piece) == pieces
    model = new("llama", "meta", vocab_size=vocabulary)
    asked = {"micro_batch": micro_batch, "seq_len": seq_len, "dtype": BF16}
    found = rehearse(model, **asked, liger_loss=True, device="cpu")
    assert 0 <= most - found.most <= piece * vocabulary * 2 + 16 * tokens
    on_gpu = rehearse(model, **asked, liger_loss=True)
    # With the head's gradient from the forward pass on.
    chunked = rehearse(model, **asked, loss_chunks=pieces).kept + vocabulary * 64 * 2
    assert found.kept == on_gpu.kept == pytest.approx(chunked, rel=ALLOWED)
    assert on_gpu.most < rehearse(model, **asked, loss_chunks=2).most


def test_each_sequence_adds_the_same() -> None:
    two, three, five = (rehearse(on_shapes("llama"), micro_batch=n, seq_len=32, dtype=BF16) for n in (2, 3, 5))
    assert extrapolated(two, three, 5) == five


def test_scores_are_kept_where_attention_is_not_fused() -> None:
    fused, eager = (
        rehearse(on_shapes("llama"), micro_batch=1, seq_len=160, dtype=BF16, attention=name)
        for name in ("sdpa", "eager")
    )
    scores = 2 * 4 * 160 * 160
    assert eager.kept - fused.kept > scores * 2, "in bf16, of two layers and four heads"


def test_frozen_parameters_have_no_gradient_and_keep_less() -> None:
    whole, part = on_shapes("llama"), new("llama", "meta")
    for name, parameter in part.named_parameters():
        parameter.requires_grad_("o_proj" in name)
    tuned, frozen = (rehearse(model, micro_batch=2, seq_len=64, dtype=BF16) for model in (whole, part))
    assert frozen.elements == 2 * 64 * 64
    assert frozen.kept < tuned.kept


def test_logits_are_told_apart() -> None:
    found = rehearse(on_shapes("llama"), micro_batch=2, seq_len=64, dtype=BF16)
    first = found.moments[0]
    assert first.logits == 2 * 64 * 300 * (2 + 4 + 4), "in bf16, in fp32 and as probabilities"


def test_what_does_not_run_on_shapes_is_said() -> None:
    class Asks(torch.nn.Module):
        config = None

        def forward(self, **_: Any) -> Any:
            raise TypeError("no shapes here")

    shape = shape_of_module("asks", Asks())
    assert ModelPasses(shape, Batch()).own == Passes()
    model = on_shapes("llama")
    known = shape_of_module("llama", model, config=model.config)
    assert ModelPasses(known, Batch()).own.how == COUNTED
    broken = shape_of_module("llama", Asks(), config=model.config)
    assert ModelPasses(broken, Batch()).own.how == FORMULA


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("GPT2LMHeadModel", Batch(micro_batch=4, device="cpu")),
        ("BloomForCausalLM", Batch(checkpointing=True)),
        ("CohereForCausalLM", Batch(seq_len=128)),
    ],
)
def test_the_formula_is_short_by_no_more_than_it_says(name: str, batch: Batch) -> None:
    model = model_of(name)
    shape = shape_of_module(name, model, config=model.config)
    counted = ModelPasses(shape, batch).own
    assert counted.how == COUNTED
    trained = [parameter.numel for parameter in shape.trainable]
    assert shape.transformer is not None
    found = by_formula(shape.transformer, batch, largest=max(trained), elements=sum(trained))
    assert found.most <= counted.most * 1.05
    assert counted.most <= found.most + found.short
    assert (shape.transformer.tied, found.elements) == (True, counted.elements)


def test_a_moment_of_backward_has_the_gradients_and_buckets_of_then() -> None:
    passes = Passes(moments=(Moment(held=100, made=0), Moment(held=90, made=5), Moment(held=10, made=10)))
    assert Backward().fullest(passes).total == 100
    grown = Backward(more_gradients=60, buckets=20).fullest(passes)
    assert (grown.gradients, grown.buckets, grown.total) == (30, 20, 140)
    at_the_end = Backward(more_gradients=200, buckets=20, reduced_last=True).fullest(passes)
    assert (at_the_end.gradients, at_the_end.buckets, at_the_end.total) == (200, 20, 230)
    last_rank = Backward(more_gradients=60, first=0.0, last=0.5).fullest(passes)
    first_rank = Backward(more_gradients=60, first=0.5, last=1.0).fullest(passes)
    assert (last_rank.total, first_rank.total) == (150, 100)
    gathered = Backward(gathered=50, whole=60, ahead=5).fullest(passes)
    assert (gathered.gathered, gathered.total) == (50, 150)
