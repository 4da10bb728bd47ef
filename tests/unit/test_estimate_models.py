"""What an estimate counts of the models of ``transformers``: all that a config describes, or the part that is said."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ds_optim.cli.app import main
from ds_optim.errors import UserError
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_model import ModelShape, Parameter, shape_of_list
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.estimate_widths import Transformer
from ds_optim.memory.side_by_side import EstimateRequest
from ds_optim.report.estimate import notes
from tests.unit.zoo import ZOO, config_of, model_of

#: No attention, no words, or an encoder beside the decoder.
WITHOUT_WIDTHS = {
    *("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM", "RwkvForCausalLM"),
    *("ViTForImageClassification", "SwinForImageClassification", "ConvNextForImageClassification"),
    *(f"{name}ForConditionalGeneration" for name in ("T5", "Bart", "Whisper")),
}


def counted(tmp_path: Path, content: dict[str, Any]) -> ModelShape:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return load_shape(str(path), None)


def widths(tmp_path: Path, name: str, **changed: Any) -> Transformer:
    found = counted(tmp_path, config_of(name, **changed)).transformer
    assert found is not None
    return found


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_of_the_named_class_is_counted(name: str, tmp_path: Path) -> None:
    found = counted(tmp_path, config_of(name))
    model = model_of(name)
    assert found.counted == name
    assert {p.name: p.shape for p in found.parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert found.numel == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "count"),
    [("gpt2", 124_439_808), ("mixtral", 46_702_792_704), ("opt", 125_239_296), ("deepseek_v3", 671_026_404_352)],
)
def test_published_sizes(kind: str, count: int, tmp_path: Path) -> None:
    """Of the models whose configs are the defaults: GPT-2, Mixtral 8x7B, OPT-125M, DeepSeek-V3 without its head for
    predicting several tokens."""
    assert counted(tmp_path, {"model_type": kind}).numel == count


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("MllamaForConditionalGeneration", "MllamaForCausalLM"),
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
        ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
        ("BartForConditionalGeneration", "BartForCausalLM"),
        ("WhisperForConditionalGeneration", "WhisperForCausalLM"),
    ],
)
def test_a_part_is_counted_only_where_it_is_named_and_said(name: str, part: str, tmp_path: Path) -> None:
    whole = config_of(name)
    del whole["architectures"]
    everything, decoder = counted(tmp_path, whole), counted(tmp_path, config_of(name, architectures=[part]))
    assert everything.counted == name
    assert decoder.counted == f"{part}, text decoder only"
    assert decoder.numel < everything.numel
    said = notes(EstimateRequest(model=decoder, optimizers=("lion",)))
    assert said[0] == f"Counted: {part}, text decoder only."


def test_towers_are_counted_and_their_activations_are_not(tmp_path: Path) -> None:
    llava, t5 = (counted(tmp_path, config_of(f"{name}ForConditionalGeneration")) for name in ("Llava", "T5"))
    said = notes(EstimateRequest(model=llava, optimizers=("lion",)))
    assert said[0] == "Counted: LlavaForConditionalGeneration."
    assert any("checkpointing, of the text decoder alone, are counted by" in line for line in said)
    assert any("widths are not known" in line for line in notes(EstimateRequest(model=t5, optimizers=("lion",))))


def test_classes_that_transformers_has_not_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^the config's \"architectures\" names 'LamaForCausalLM', which transformers .* has not: correct it",
    ):
        counted(tmp_path, config_of("LlamaForCausalLM", architectures=["LamaForCausalLM"]))
    with pytest.raises(UserError, match="cannot build a model of this config"):
        counted(tmp_path, config_of("LlamaForCausalLM", architectures=["ViTForImageClassification"]))


def shape_of(parameters: tuple[Parameter, ...], pattern: str) -> tuple[int, ...]:
    """Of the last of the parameters so named: of several towers the text decoder."""
    found = [p.shape for p in parameters if re.search(rf"\.{pattern}\.weight$", p.name) and "vision" not in p.name]
    return found[-1] if found else ()


@pytest.mark.parametrize("name", ZOO)
def test_widths_are_those_of_the_weights(name: str, tmp_path: Path) -> None:
    model = counted(tmp_path, config_of(name))
    assert (model.transformer is None) == (name in WITHOUT_WIDTHS)
    if model.transformer is None or name.startswith("Deepseek"):  # whose attention is latent
        return
    found = model.transformer
    queries, keys = shape_of(model.parameters, "q_proj"), shape_of(model.parameters, "k_proj")
    fused = shape_of(model.parameters, "(query_key_value|qkv_proj|Wqkv)")
    gate, up = shape_of(model.parameters, "gate_proj"), shape_of(model.parameters, "(up_proj|fc1|fc_in)")
    if keys and "Qwen3_5" not in name:  # which has a gate beside its queries
        assert queries == (found.heads * found.head_dim, found.hidden)
        assert keys == (found.key_value_heads * found.head_dim, found.hidden)
    if fused:
        assert fused[0] == (found.heads + 2 * found.key_value_heads) * found.head_dim
    if up and not any("expert" in p.name for p in model.parameters):
        assert up[0] == found.intermediate
    assert found.gated or not gate


def test_gates_key_value_heads_and_experts_of_families_that_write_them_otherwise(tmp_path: Path) -> None:
    assert [widths(tmp_path, f"Gemma{n}ForCausalLM").gated for n in ("", "2", "3")] == [True] * 3
    assert [widths(tmp_path, name).gated for name in ("GPT2LMHeadModel", "FalconForCausalLM", "OPTForCausalLM")] == [
        False
    ] * 3
    assert [widths(tmp_path, name).gated for name in ("Phi3ForCausalLM", "GptOssForCausalLM")] == [True] * 2
    assert widths(tmp_path, "FalconForCausalLM").key_value_heads == 1
    newer = {"new_decoder_architecture": True, "num_attention_heads": 16, "num_kv_heads": 4, "hidden_size": 256}
    assert widths(tmp_path, "FalconForCausalLM", **newer).key_value_heads == 4
    older = {"multi_query": False, "num_attention_heads": 16, "hidden_size": 256}
    assert widths(tmp_path, "FalconForCausalLM", **older).key_value_heads == 16
    assert widths(tmp_path, "GPTBigCodeForCausalLM").key_value_heads == 1
    assert widths(tmp_path, "GPTBigCodeForCausalLM", multi_query=False).key_value_heads == 12
    assert widths(tmp_path, "DeepseekV3ForCausalLM").head_dim == (192 + 128) // 2
    assert widths(tmp_path, "MixtralForCausalLM").intermediate == 2 * 14336
    assert widths(tmp_path, "GptOssForCausalLM").intermediate == 4 * 2880
    assert widths(tmp_path, "DeepseekV3ForCausalLM").intermediate == (8 + 1) * 2048
    assert widths(tmp_path, "LlamaForSequenceClassification").vocabulary == 0, "no logits over words"


def test_widths_of_each_layer_are_met_with_the_largest(tmp_path: Path) -> None:
    found = counted(tmp_path, {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]}).transformer
    assert found is not None
    assert found.head_dim == 512
    small = {"num_hidden_layers": 5, "vocab_size": 300, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0}
    small |= {"hidden_size": 64, "layer_types": ["full_attention"] * 5, "activation_sparsity_pattern": [0.0] * 5}
    several = {"model_type": "gemma3n_text", **small, "intermediate_size": [32, 64, 32, 32, 32]}
    found = counted(tmp_path, several).transformer
    assert found is not None
    assert (found.intermediate, found.gated) == (64, True)


def test_options_of_routing_count_in_an_estimate(tmp_path: Path) -> None:
    """They were dropped: experts that a view makes matrices of have a matrix rule's state."""
    model = counted(tmp_path, config_of("MixtralForCausalLM"))
    plain = plan_optimizer(model, "muon", {"aux": "adamw", "views_defaults": False})
    views = [{"match": r"experts\.", "batch_dims": 1}]
    viewed = plan_optimizer(model, "muon", {"aux": "adamw", "views_defaults": False, "views": views})
    experts = sum(p.numel for p in model.parameters if "experts" in p.name)
    sizes = [sum(p.numel for p in plan.groups[0].parameters) for plan in (plain, viewed)]
    assert sizes[1] - sizes[0] == experts
    everything = plan_optimizer(model, "muon", {"matrix_exclude_defaults": False})
    assert "lm_head.weight" in {p.name for p in everything.groups[0].parameters}
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        plan_optimizer(model, "muon", {"matrix_exclude": ["nothing"]})
    with pytest.raises(UserError, match="views: 1,000 parameters has no names and shapes to route"):
        plan_optimizer(load_shape(None, 1000), "muon", {"views": []})


def test_lora_trains_and_keeps_little(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("LlamaForCausalLM", hidden_size=64, intermediate_size=96)))
    whole, adapted = load_shape(str(path), None), load_shape(str(path), None, lora=8)
    assert sum(p.numel for p in adapted.frozen) == whole.numel
    assert sum(p.numel for p in adapted.trainable) == 2 * 8 * (4 * (64 + 64) + 3 * (64 + 96))
    passes = [EstimateRequest(model=m, optimizers=("lion",), seq_len=32).passes.own for m in (whole, adapted)]
    assert passes[1].kept < passes[0].kept
    with pytest.raises(UserError, match="--lora is 0: write the rank"):
        load_shape(str(path), None, lora=0)
    with pytest.raises(UserError, match="is only a list of parameters"):
        load_shape(None, 1e6, lora=8)


def test_tensor_parallel_ranks_hold_what_transformers_says_is_cut() -> None:
    held = {p.name: p for p in load_shape("qwen3-tiny", None).for_ranks(2, 1).parameters}
    whole = {p.name: p.shape for p in load_shape("qwen3-tiny", None).parameters}
    layer = "model.layers.0"
    for name, dim in {"self_attn.q_proj": 0, "self_attn.o_proj": 1, "mlp.up_proj": 0, "mlp.down_proj": 1}.items():
        shape = list(whole[f"{layer}.{name}.weight"])
        shape[dim] //= 2
        assert held[f"{layer}.{name}.weight"].shape == tuple(shape)
        assert held[f"{layer}.{name}.weight"].spec.whole_numel == math.prod(whole[f"{layer}.{name}.weight"])
    assert whole["lm_head.weight"][0] % 2 == 1
    assert held["lm_head.weight"].shape[0] == whole["lm_head.weight"][0] // 2 + 1
    for name in ("model.embed_tokens.weight", f"{layer}.input_layernorm.weight"):
        assert held[name].shape == whole[name]


def test_matrices_are_worked_on_whole_over_tensor_parallel_ranks() -> None:
    """What a step holds of the largest matrix does not shrink with the shards, though its state does."""
    model = load_shape("qwen3-134m", None)
    whole, cut = (
        estimate(shape, plan_optimizer(shape, "muon"), ZeroSettings(stage=1, ranks=8 // shape.tensor)).largest
        for shape in (model, model.for_ranks(2, 1))
    )
    assert cut.optimizer_state < 0.7 * 2 * whole.optimizer_state
    assert cut.exchange > whole.exchange


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"tensor": 3}, "--tensor-parallel is 3, and the ranks are 8: write multiples of it"),
        ({"tensor": 16, "ranks": (16,)}, "heads of keys and values, which 16 tensor-parallel ranks do not divide"),
        ({"experts": 2}, "the model has no stacks of experts that AutoEP replaces"),
        ({"tensor": 2, "experts": 2}, "tensor- and expert-parallel ranks together are not supported"),
        ({"tensor": 2, "model": "list"}, "transformers has no tp_plan of it"),
    ],
)
def test_what_parallel_ranks_cannot_cut_is_said(flags: dict[str, Any], line: str) -> None:
    name = flags.pop("model", "qwen3-tiny")
    model = shape_of_list("list", {"w": [8, 8]}) if name == "list" else load_shape(name, None)
    with pytest.raises(UserError, match=re.escape(line)):
        EstimateRequest(model=model, optimizers=("lion",), **flags).held  # noqa: B018


def test_a_json_says_what_the_flags_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    rows = []
    for flags in (["--config", str(path)], ["--tensor-parallel", "2"], []):
        given = ["estimate", "--model", "qwen3-tiny", "--optimizers", "lion", "--stages", "2", "--json", *flags]
        with pytest.raises(SystemExit) as end:
            main(given)
        assert end.value.code in (0, None)
        rows.append(json.loads(capsys.readouterr().out)[0])
    assert rows[0] == rows[1]
    assert [row["tensor_parallel"] for row in rows] == [2, 2, 1]
    assert all(row["ranks"] == 8 for row in rows)
    assert rows[0]["per_rank"]["weights"] < rows[2]["per_rank"]["weights"]
