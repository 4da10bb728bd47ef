"""The models of the training job, its schedule, and what its settings make of a DeepSpeed JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.errors import UserError
from ds_optim.job.architectures import is_encoder_decoder, is_text_decoder
from ds_optim.job.deepspeed_json import data_ranks, deepspeed_config, settings_from_json
from ds_optim.job.models import build_model, model_config, next_token_losses, parameter_count, preset_config
from ds_optim.job.settings import make_settings
from ds_optim.train.schedule import WarmupCosine, lr_factor
from ds_optim.train.sequences import check_parts


def test_qwen3_134m_is_the_model_of_the_source_papers() -> None:
    config = preset_config("qwen3-134m", 32_000, 1024)
    with torch.device("meta"):
        model = build_model(config, 0)
    layer = 4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768 + 2 * 64
    assert parameter_count(model) == 2 * 32_000 * 768 + 12 * layer + 768 == 134_107_392
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.intermediate_size, config.vocab_size, config.tie_word_embeddings) == (2048, 32_000, False)


def test_qwen3_tiny_takes_the_tokenizers_vocabulary() -> None:
    model = build_model(preset_config("qwen3-tiny", 257, 128), 0)
    assert 1_000_000 < parameter_count(model) < 2_000_000
    assert model.get_parameter("lm_head.weight").shape == (257, 128)


def test_weights_follow_from_the_seed_alone() -> None:
    config = preset_config("qwen3-tiny", 257, 128)
    first, again, other = (build_model(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_loss_is_of_the_next_token() -> None:
    """A model that always repeats its input scores perfectly on a constant text and badly on a changing one."""

    class Repeats(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = 50.0 * torch.nn.functional.one_hot(input_ids, 5).float()
            return type("Output", (), {"logits": logits})

    same = next_token_losses(Repeats(), torch.tensor([[3, 3, 3, 3]]))
    assert same.shape == (3,)
    assert float(same.max()) < 1e-6
    assert next_token_losses(Repeats(), torch.tensor([[0, 1, 1, 2]])).tolist() == pytest.approx([50, 0, 50])


@pytest.mark.parametrize("as_file", [True, False])
def test_any_causal_model_is_built_from_its_config(tmp_path: Path, as_file: bool) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=300, n_positions=64).save_pretrained(tmp_path)
    model = build_model(model_config(str(tmp_path / "config.json" if as_file else tmp_path), 257), 0)
    assert next_token_losses(model, torch.zeros(2, 9, dtype=torch.long)).shape == (16,)
    with pytest.raises(UserError, match=r"vocabulary of 300, the tokenizer one of 4096; use --tokenizer bpe:300"):
        model_config(str(tmp_path), 4096)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64}


@pytest.mark.parametrize(
    ("kind", "shape", "attention"),
    [
        ("llama", {**SMALL, **HEADS}, "sdpa"),
        ("gemma2", {**SMALL, **HEADS}, "eager"),
        ("gpt_oss", {**SMALL, **HEADS, "num_local_experts": 4}, "eager"),
        ("mamba", SMALL, "eager"),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "eager"),
        ("mpt", MPT, "eager"),
        ("rwkv", {**SMALL, "attention_hidden_size": 32, "context_length": 64}, "eager"),
    ],
)
def test_models_without_fused_attention_take_their_own(kind: str, shape: dict[str, Any], attention: str) -> None:
    from transformers import CONFIG_MAPPING

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = build_model(CONFIG_MAPPING[kind](**shape, **special), 0)
    assert model.config._attn_implementation == attention
    losses = next_token_losses(model, torch.arange(18).reshape(2, 9))
    assert losses.shape == (16,)
    assert torch.isfinite(losses).all()


def test_a_text_decoder_of_several_parts_is_told() -> None:
    from transformers import BartConfig, LlamaConfig, LlavaConfig

    for config, alone in (
        (BartConfig(encoder_layers=1, decoder_layers=1), True),
        (LlamaConfig(num_hidden_layers=1), False),
    ):
        encodes = is_encoder_decoder(config)
        with torch.device("meta"):
            model = build_model(config, 0)
        assert is_text_decoder(config, model, encodes) is alone
    with pytest.raises(UserError, match=r"no causal language model for this config \('llava'\)"):
        build_model(LlavaConfig(), 0)


def test_config_that_is_none_or_no_causal_model_is_one_line(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    with pytest.raises(UserError, match="cannot load a model config") as caught:
        model_config(str(tmp_path), 257)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no causal language model"):
        build_model(CLIPVisionConfig(), 0)


def test_schedule_warms_up_then_falls_to_zero() -> None:
    factors = [lr_factor(step, 4, 20) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(before > after for before, after in pairwise(factors[4:]))
    assert factors[12] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(0.0)


def test_schedule_keeps_the_ratio_of_groups() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = WarmupCosine(optimizer, warmup=1, steps=5)
    for step in (0, 3, 1, 4):
        first = schedule.set(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([first, first / 10])
        assert first == pytest.approx(lr_factor(step, 1, 5))


def test_json_settings_reach_deepspeed_and_flags_win() -> None:
    written = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "bf16": {"enabled": True, "immediate_grad_update": False},
        "optimizer": {"type": "LionMuon", "params": {"lr": 0.5, "aux_lr": "auto", "heads": "auto"}},
    }
    before = json.dumps(written)
    settings = make_settings(**settings_from_json(written, {"stage": 3, "accumulation": 2}))
    assert json.dumps(written) == before
    config = deepspeed_config(settings, world_size=2)
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": False}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["optimizer"] == {"type": "LionMuon", "params": {"lr": 0.5, "heads": "auto"}}, "heads' is its own"


def test_json_that_cuts_sequences_gives_their_ranks_one_batch() -> None:
    settings = make_settings(**settings_from_json({"sequence_parallel_size": 2}, {"seq_len": 32}))
    assert data_ranks(settings.deepspeed, 4) == 2
    with pytest.raises(UserError, match=r"sequence_parallel_size is 2, which does not divide 3 rank\(s\)"):
        data_ranks(settings.deepspeed, 3)
    check_parts(settings)
    for given, said in (
        ({"seq_len": 33}, "does not divide --seq-len 33"),
        ({"zero_init": True, "stage": 3}, "--zero-init"),
    ):
        with pytest.raises(UserError, match=said):
            check_parts(settings.model_copy(update=given))


def test_json_batch_that_does_not_multiply_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    settings = make_settings(**settings_from_json({"train_batch_size": 24}, {"micro_batch": 4}))
    assert deepspeed_config(settings, world_size=6)["train_micro_batch_size_per_gpu"] == 4
    with pytest.raises(UserError, match=r"train_batch_size 24 is not micro_batch 4 .* = 8"):
        deepspeed_config(settings, world_size=2)


@pytest.mark.parametrize(
    ("written", "flags", "meant"),
    [
        # what a JSON does not say means what DeepSpeed means by it
        ({}, {}, {"dtype": "fp32", "stage": 0, "clip": 1.0}),
        ({"bf16": None}, {}, {"dtype": "fp32"}),
        # DeepSpeed's own types
        ({"bf16": {"enabled": "true"}}, {}, {"dtype": "bf16"}),
        ({"fp16": {"enabled": 1}, "zero_optimization": {"stage": "2"}}, {}, {"dtype": "fp16", "stage": 2}),
        ({"bfloat16": {"enabled": True}}, {}, {"dtype": "bf16"}),
        ({"bfloat16": {"enabled": True}, "bf16": {}}, {}, {"dtype": "fp32"}),
        # "auto" is the flag's, or train's own default
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, {}, {"dtype": "bf16"}),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, {"dtype": "fp32"}, {"dtype": "fp32"}),
        ({"zero_optimization": {"stage": "auto"}, "gradient_clipping": "auto"}, {}, {"stage": 1, "clip": 1.0}),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, {"lr": 0.5}, {"lr": 0.5}),
        # a global batch is dealt out as DeepSpeed deals it out
        ({"train_batch_size": 12}, {}, {"micro_batch": 6, "accumulation": 1}),
        ({"train_batch_size": 12, "gradient_accumulation_steps": "auto"}, {"micro_batch": 2}, {"accumulation": 3}),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 3}, {}, {"micro_batch": 2}),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3}, {}, {"micro_batch": 3, "accumulation": 1}),
    ],
)
def test_a_json_means_to_train_what_it_means_to_deepspeed(
    monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], flags: dict[str, Any], meant: dict[str, Any]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = make_settings(**settings_from_json(written, flags))
    assert {name: getattr(settings, name) for name in meant} == meant
    config = deepspeed_config(settings, world_size=2)
    assert [config[name]["enabled"] for name in ("bf16", "fp16")] == [settings.dtype == n for n in ("bf16", "fp16")]
    assert config["zero_optimization"]["stage"] == settings.stage


def test_lr_goes_over_the_presets_tuned_rate() -> None:
    tuned = make_settings(optimizer="lion_muon").resolved_params()
    assert tuned["lr"] > 0
    assert make_settings(optimizer="LionMuon", lr=0.5).resolved_params() == {**tuned, "lr": 0.5}
    assert make_settings(preset="qwen3-134m", optimizer="lion_muon").resolved_params() == {}


def test_a_runs_seed_is_its_optimizers() -> None:
    for name, expected in (
        ("lion_muon", {"seed": 2}),
        ("StoSignSGD", {"seed": 2}),
        ("adamw", {}),
        ("deepspeed:Lion", {}),
    ):
        assert make_settings(preset="qwen3-134m", optimizer=name, seed=2).resolved_params() == expected
    given = make_settings(preset="qwen3-134m", optimizer="lion", seed=2, optimizer_params={"seed": 7})
    assert given.resolved_params() == {"seed": 7}
