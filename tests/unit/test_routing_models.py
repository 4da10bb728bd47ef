"""What the parameters of real models get: every one of two or more dimensions, by a table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.routes import routes
from ds_optim.optimizers.routing import MEMBERS, param_groups
from tests.unit.zoo import model_of

QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
QKV_OUT = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj "
CROSS = "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj "
GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj "
BIG = "{0}.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
BERT = "self.query self.key self.value output.dense intermediate.dense "
BERT_WORDS = "embeddings.word_embeddings embeddings.position_embeddings embeddings.token_type_embeddings"
WORDS, HEAD = {"embedding": "model.embed_tokens"}, {"output head": "lm_head"}
EXPERTS = {"experts": "experts.gate_up_proj experts.down_proj"}
GATE = {"router": "mlp.gate"}
MAMBA = {
    "matrix": "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj",
    "depthwise convolution": "mixer.conv1d",
    "diagonal": "mixer.A_log",
    "embedding": "backbone.embeddings",
}

#: By class, and by what a parameter is: names without layers' numbers and ".weight", their last two parts.
ROUTES: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": {"matrix": QKVO + GATED, **WORDS, **HEAD},
    "LlamaForSequenceClassification": {"matrix": QKVO + GATED, **WORDS, "output head": "score"},
    "MistralForCausalLM": {"matrix": QKVO + GATED, **WORDS, **HEAD},
    "Qwen2ForCausalLM": {"matrix": QKVO + GATED, **WORDS, **HEAD},
    "Qwen3ForCausalLM": {"matrix": QKVO + GATED, **WORDS, **HEAD},
    "Gemma2ForCausalLM": {"matrix": QKVO + GATED, **WORDS},
    "Gemma3ForCausalLM": {"matrix": QKVO + GATED, **WORDS},
    "Olmo2ForCausalLM": {"matrix": QKVO + GATED, **WORDS, **HEAD},
    "OPTForCausalLM": {
        "matrix": QKV_OUT + "layers.fc1 layers.fc2",
        "embedding": "decoder.embed_tokens decoder.embed_positions",
    },
    "BloomForCausalLM": {
        "matrix": BIG.format("self_attention"),
        "fused": "self_attention.query_key_value",
        "embedding": "transformer.word_embeddings",
    },
    "CohereForCausalLM": {"matrix": QKVO + GATED, **WORDS, "gain": "self_attn.q_norm self_attn.k_norm"},
    "Phi3ForCausalLM": {
        "matrix": "self_attn.o_proj mlp.down_proj",
        "fused": "self_attn.qkv_proj mlp.gate_up_proj",
        **WORDS,
        **HEAD,
    },
    "GPT2LMHeadModel": {
        "matrix": "attn.c_proj mlp.c_fc mlp.c_proj",
        "fused": "attn.c_attn",
        "embedding": "transformer.wte transformer.wpe",
    },
    "GPTJForCausalLM": {
        "matrix": "attn.k_proj attn.v_proj attn.q_proj attn.out_proj mlp.fc_in mlp.fc_out",
        "embedding": "transformer.wte",
        **HEAD,
    },
    "GPTNeoXForCausalLM": {
        "matrix": BIG.format("attention"),
        "fused": "attention.query_key_value",
        "embedding": "gpt_neox.embed_in",
        **HEAD,
    },
    "FalconForCausalLM": {
        "matrix": BIG.format("self_attention"),
        "fused": "self_attention.query_key_value",
        "embedding": "transformer.word_embeddings",
    },
    "MixtralForCausalLM": {"matrix": QKVO, **WORDS, **HEAD, **GATE, **EXPERTS},
    "Qwen3MoeForCausalLM": {"matrix": QKVO, **WORDS, **HEAD, **GATE, **EXPERTS},
    "GptOssForCausalLM": {
        "matrix": QKVO,
        "bias": "experts.gate_up_proj_bias experts.down_proj_bias",
        "router": "mlp.router",
        **WORDS,
        **HEAD,
        **EXPERTS,
    },
    "DeepseekV3ForCausalLM": {
        "matrix": "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj"
        " self_attn.o_proj shared_experts.gate_proj shared_experts.up_proj shared_experts.down_proj " + GATED,
        **WORDS,
        **HEAD,
        **GATE,
        **EXPERTS,
    },
    "Llama4ForConditionalGeneration": {
        "matrix": QKVO + "mlp.fc1 mlp.fc2 multi_modal_projector.linear_1"
        " shared_expert.gate_proj shared_expert.up_proj shared_expert.down_proj",
        "embedding": "vision_model.positional_embedding_vlm patch_embedding.linear model.embed_tokens",
        "output head": "language_model.lm_head",
        "router": "feed_forward.router",
        **EXPERTS,
    },
    "MambaForCausalLM": MAMBA,
    "FalconMambaForCausalLM": MAMBA,
    "RwkvForCausalLM": {
        "matrix": "attention.key attention.value attention.receptance attention.output"
        " feed_forward.key feed_forward.receptance feed_forward.value",
        "embedding": "rwkv.embeddings",
        "output head": "head",
        "no view": "attention.time_mix_key attention.time_mix_value attention.time_mix_receptance"
        " feed_forward.time_mix_key feed_forward.time_mix_receptance",
    },
    "BertForMaskedLM": {"matrix": BERT + "transform.dense", "embedding": BERT_WORDS},
    "BertForSequenceClassification": {
        "matrix": BERT + "pooler.dense",
        "embedding": BERT_WORDS,
        "output head": "classifier",
    },
    "RobertaForSequenceClassification": {
        "matrix": BERT + "classifier.dense",
        "embedding": BERT_WORDS,
        "output head": "classifier.out_proj",
    },
    "DistilBertForMaskedLM": {
        "matrix": "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2 vocab_transform",
        "embedding": "embeddings.word_embeddings embeddings.position_embeddings",
    },
    "XLNetLMHeadModel": {
        "matrix": "ff.layer_1 ff.layer_2",
        "bias": "rel_attn.r_r_bias rel_attn.r_s_bias rel_attn.r_w_bias",
        "embedding": "transformer.word_embedding rel_attn.seg_embed",
        "no view": "transformer.mask_emb",
        "fused": "rel_attn.q rel_attn.k rel_attn.v rel_attn.o rel_attn.r",
    },
    "RecurrentGemmaForCausalLM": {
        "matrix": "temporal_block.linear_y temporal_block.linear_x temporal_block.linear_out temporal_block.q_proj"
        " temporal_block.k_proj temporal_block.v_proj temporal_block.o_proj mlp_block.gate_proj mlp_block.up_proj"
        " mlp_block.down_proj",
        "fused": "rg_lru.input_gate_weight rg_lru.recurrent_gate_weight",
        "depthwise convolution": "temporal_block.conv_1d",
        "bias": "rg_lru.input_gate_bias rg_lru.recurrent_gate_bias",
        **WORDS,
    },
    "T5ForConditionalGeneration": {
        "matrix": "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o DenseReluDense.wi DenseReluDense.wo"
        " EncDecAttention.q EncDecAttention.k EncDecAttention.v EncDecAttention.o",
        "embedding": "shared SelfAttention.relative_attention_bias",
    },
    "BartForConditionalGeneration": {
        "matrix": QKV_OUT + CROSS + "layers.fc1 layers.fc2",
        "embedding": "model.shared encoder.embed_positions decoder.embed_positions",
    },
    "WhisperForConditionalGeneration": {
        "matrix": QKV_OUT + CROSS + "layers.fc1 layers.fc2 encoder.conv1 encoder.conv2",
        "embedding": "decoder.embed_tokens decoder.embed_positions",
    },
    "ViTForImageClassification": {
        "matrix": "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
        "embedding": "embeddings.cls_token embeddings.position_embeddings patch_embeddings.projection",
        "output head": "classifier",
    },
    "SwinForImageClassification": {
        "matrix": "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"
        " downsample.reduction",
        "table": "relative_position_bias.relative_position_bias_table",
        "embedding": "patch_embeddings.projection",
        "output head": "classifier",
    },
    "ConvNextForImageClassification": {
        "matrix": "layers.pwconv1 layers.pwconv2 stages.downsampling_layer",
        "depthwise convolution": "layers.dwconv",
        "embedding": "embeddings.patch_embeddings",
        "output head": "classifier",
    },
}


def short(name: str) -> str:
    """The last two parts of a name, without layers' numbers and ".weight"."""
    return ".".join([part for part in name.removesuffix(".weight").split(".") if not part.isdecimal()][-2:])


def routed(model: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group in param_groups(model):
        for member in group[MEMBERS]:
            if len(member.spec.shape) > 1:
                assert (group["role"] == "matrix") == (member.view is not None) == (not member.reason)
                what = "experts" if "experts" in member.derived else "fused" if member.derived else "matrix"
                found.setdefault(member.reason or what, set()).add(short(member.spec.name))
    return found


@pytest.mark.parametrize("name", ROUTES)
def test_every_parameter_gets_what_it_is(name: str) -> None:
    assert routed(model_of(name)) == {what: set(names.split()) for what, names in ROUTES[name].items()}


BIASES = "experts.gate_up_proj_bias experts.down_proj_bias"
#: What DeepSpeed's own Muon orthogonalizes that is no matrix, or steps as one matrix although it is several.
THEIRS_WRONG: dict[str, str] = {
    "LlamaForSequenceClassification": "score",
    "Phi3ForCausalLM": "self_attn.qkv_proj mlp.gate_up_proj",
    "BloomForCausalLM": "self_attention.query_key_value",
    "CohereForCausalLM": "self_attn.q_norm self_attn.k_norm",
    "GPT2LMHeadModel": "transformer.wte transformer.wpe attn.c_attn",
    "GPTJForCausalLM": "transformer.wte",
    "GPTNeoXForCausalLM": "attention.query_key_value",
    "FalconForCausalLM": "self_attention.query_key_value",
    "MixtralForCausalLM": "mlp.gate experts.gate_up_proj",
    "Qwen3MoeForCausalLM": "mlp.gate experts.gate_up_proj",
    "GptOssForCausalLM": "mlp.router experts.gate_up_proj " + BIASES,
    "DeepseekV3ForCausalLM": "mlp.gate experts.gate_up_proj",
    "Llama4ForConditionalGeneration": "feed_forward.router experts.gate_up_proj",
    "MambaForCausalLM": "mixer.conv1d mixer.A_log",
    "FalconMambaForCausalLM": "mixer.conv1d mixer.A_log",
    "RwkvForCausalLM": "head " + ROUTES["RwkvForCausalLM"]["no view"],
    "BertForSequenceClassification": "classifier",
    "RobertaForSequenceClassification": "classifier.out_proj",
    "XLNetLMHeadModel": " ".join(ROUTES["XLNetLMHeadModel"][what] for what in ("no view", "fused", "bias")),
    "RecurrentGemmaForCausalLM": "temporal_block.conv_1d rg_lru.input_gate_bias rg_lru.recurrent_gate_bias",
    "T5ForConditionalGeneration": "shared SelfAttention.relative_attention_bias",
    "BartForConditionalGeneration": "model.shared",
    "ViTForImageClassification": "classifier",
    "SwinForImageClassification": "classifier relative_position_bias.relative_position_bias_table",
    "ConvNextForImageClassification": "classifier layers.dwconv",
}


@pytest.mark.parametrize("name", ROUTES)
def test_deepspeeds_own_muon_routes_fewer_of_them_right(name: str) -> None:
    """By its own function. It is right of stacked experts that are one matrix each, which it steps one by one."""
    from deepspeed import set_optimizer_flags

    model = model_of(name)
    set_optimizer_flags(SimpleNamespace(optimizer_name="muon", optimizer_params={}), model)  # type: ignore[arg-type]
    theirs = {short(key) for key, parameter in model.named_parameters() if parameter.use_muon}  # type: ignore[attr-defined]
    expected = {what: set(names.split()) for what, names in ROUTES[name].items()}
    ours = set().union(*(expected.get(what, ()) for what in ("matrix", "fused", "experts")))
    one_by_one = {"rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight"}
    several = expected.get("fused", set()) - one_by_one | {
        key for key in expected.get("experts", ()) if "gate_up" in key
    }
    assert (theirs ^ ours) | several == set(THEIRS_WRONG.get(name, "").split())


def test_the_docs_show_the_table() -> None:
    rows = []
    for name, kinds in ROUTES.items():
        count = sum(len(set(names.split())) for names in kinds.values())
        wrong = THEIRS_WRONG.get(name, "").split()
        listed = ", ".join(f"`{one}`" for one in dict.fromkeys(wrong)) or "—"
        rows.append(f"| {name} | {count} | {count} | {count - len(set(wrong))} | {listed} |")
    assert len(rows) >= 20
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "\n".join(rows)


@pytest.mark.parametrize(
    ("name", "share", "match", "as_seen"),
    [
        ("MixtralForCausalLM", "89%", r"experts\.", "8 x 28672x4096 (batch_dims)"),
        ("GptOssForCausalLM", "84%", r"experts\.", "128 x 5760x2880 (transpose, batch_dims)"),
        ("Llama4ForConditionalGeneration", "61%", r"experts\.", "16 x 16384x5120 (transpose, batch_dims)"),
        # "experts." would find shared_experts too, whose matrices are no stack.
        ("DeepseekV3ForCausalLM", "81%", r"\bexperts\.", "256 x 4096x7168 (batch_dims)"),
    ],
)
def test_experts_on_the_aux_rule_are_warned_of_with_the_view_to_write(
    name: str, share: str, match: str, as_seen: str
) -> None:
    model = model_of(name)
    *_, last = routes(ds_optim.Muon(param_groups(model, views_defaults=False)))
    written = re.search(r'"views": (\[.*\]), or', last)
    assert written is not None, last
    assert last.startswith(f"ds_optim: warning: {share} of the parameters look like stacks"), last
    views = json.loads(written.group(1))
    assert views == [{"match": match, "batch_dims": 1}]
    followed = list(routes(ds_optim.Muon(param_groups(model, views=views))))
    assert not any("warning" in line for line in followed)
    assert any("experts.gate_up_proj" in line and line.endswith(as_seen) for line in followed)
    assert not any("warning" in line for line in routes(ds_optim.Lion(param_groups(model)))), "it has no aux rule"


def test_other_stacks_are_warned_of_without_a_guess() -> None:
    *_, last = routes(ds_optim.Muon(param_groups(model_of("XLNetLMHeadModel"), views_defaults=False)))
    assert "transformer.layer.*.rel_attn.q 1024x16x64" in last
    assert 'write "views": [{"match": "…", "batch_dims": 1}] where the first dimension counts matrices' in last


class Attention(nn.Module):
    """Names that mean an output at the top of a model, and none here."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.output, self.fc_out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.gate = nn.Linear(6, 12)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


WIDER = ("output_layer", "final_linear", "readout", "unembedding")


@pytest.mark.parametrize(
    "name",
    ["head", "score", "classifier", "output", "cls", "fc_out", "lm_head", "qa_outputs", "fc", *WIDER],
)
def test_a_linear_at_the_top_is_an_output_head_by_its_name(name: str) -> None:
    for last in (nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))):
        model = nn.Module()
        model.blocks = nn.ModuleList([Attention()])
        model.add_module(name, last)
        reasons = {
            m.spec.name: m.reason for group in param_groups(Wrapped(model)) for m in group[MEMBERS] if m.spec.shape[1:]
        }
        assert all(reasons[f"module.blocks.0.{part}.weight"] == "" for part in ("head", "output", "fc_out", "gate"))
        ends = [key for key, reason in reasons.items() if reason == "output head"]
        whole = isinstance(last, nn.Linear) or name in ("head", "score", "classifier", "cls", "lm_head")
        expected = f"module.{name}.weight" if isinstance(last, nn.Linear) else f"module.{name}.2.weight"
        if name == "lm_head" and not isinstance(last, nn.Linear):
            assert ends == ["module.lm_head.0.weight", "module.lm_head.2.weight"], "the name is enough"
        else:
            assert ends == ([expected] if whole else [])


def test_a_router_is_one_by_its_class_whatever_its_name() -> None:
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6))

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"chooser": TopKRouter(), "up": nn.Linear(6, 12)})])
    reasons = {m.spec.name: m.reason for group in param_groups(model) for m in group[MEMBERS]}
    assert reasons["layers.0.chooser.weight"] == "router"
    assert reasons["layers.0.up.weight"] == ""


def test_vectors_stored_as_matrices_are_none() -> None:
    model = nn.Module()
    model.row, model.column = nn.Linear(9, 1), nn.Linear(1, 9)
    model.point, model.single = nn.Conv2d(9, 1, 1), nn.Conv1d(1, 9, 1)
    model.depthwise, model.grouped = nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 6, 3, groups=3)
    model.norm = nn.LayerNorm([3, 4])
    model.experts = nn.ParameterDict({"up_bias": torch.zeros(3, 4), "up": torch.zeros(4, 4)})
    model.A_log = nn.Parameter(torch.zeros(4, 3))
    reasons = {m.spec.name: m.reason for group in param_groups(model) for m in group[MEMBERS] if m.spec.shape[1:]}
    assert reasons == {
        **dict.fromkeys(("row.weight", "column.weight", "point.weight", "single.weight"), "vector"),
        "depthwise.weight": "depthwise convolution",
        "grouped.weight": "",
        **dict.fromkeys(("norm.weight", "norm.bias"), "gain"),
        "experts.up_bias": "bias",
        "experts.up": "",
        "A_log": "diagonal",
    }
    everything = param_groups(model, matrix_exclude_defaults=False)
    assert {m.spec.name for m in everything[0][MEMBERS]} == {"grouped.weight", "experts.up"}, "no option makes them any"


def test_weight_norm_stores_a_layers_weight_and_its_norms() -> None:
    from torch.nn.utils import parametrizations, weight_norm

    model = nn.Module()
    model.conv = parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    model.linear = parametrizations.weight_norm(nn.Linear(4, 6))
    model.deep = parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=4), dim=2)
    with pytest.warns(FutureWarning, match="deprecated"):
        model.older = weight_norm(nn.Conv1d(4, 6, 3))
    found = {m.spec.name: m for group in param_groups(model) for m in group[MEMBERS] if m.spec.shape[1:]}
    seen = {name: m.view.describe() if m.view else m.reason for name, m in found.items()}
    assert seen == {
        "conv.parametrizations.weight.original0": "gain",
        "conv.parametrizations.weight.original1": "6x12 (conv)",
        "linear.parametrizations.weight.original0": "gain",
        "linear.parametrizations.weight.original1": "6x4",
        "deep.parametrizations.weight.original0": "gain",
        "deep.parametrizations.weight.original1": "depthwise convolution",
        "older.weight_g": "gain",
        "older.weight_v": "6x12 (conv)",
    }


def test_the_defaults_can_be_turned_off() -> None:
    model = model_of("MixtralForCausalLM")
    groups = param_groups(model, matrix_exclude=["lm_head"], matrix_exclude_defaults=False)
    matrices = {m.spec.name for m in groups[0][MEMBERS]}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} < matrices
    assert "lm_head.weight" not in matrices
    with pytest.raises(UserError, match="matrix_exclude_defaults is 'no': write true or false"):
        param_groups(model, matrix_exclude_defaults="no")  # type: ignore[arg-type]
