"""Views that are read off a model, judged by the model's own forward pass: what happens where a part is zeroed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.optimizers.routing import MEMBERS, param_groups
from ds_optim.sharding.binding import Member

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "bos_token_id": 1}
GQA = {**SMALL, "num_key_value_heads": 2}
MOE = {**GQA, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 6}
DBRX_ATTENTION = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
OUTS = ("c_proj", "dense", "o_proj", "out_proj", "Wo")
FALCON = {**SMALL, "bias": False}

#: Class, config, the fused weight's name, and its matrices, written out: how many of which shape.
QKV: list[tuple[str, dict[str, Any], str, str]] = [
    ("GPT2LMHeadModel", OF_GPT2, "c_attn", "3 x 32x32 (transpose, split)"),
    ("GPTNeoXForCausalLM", SMALL, "query_key_value", "3 x 32x32 (split, interleave)"),
    ("BloomForCausalLM", {**SMALL, "n_head": 4}, "query_key_value", "3 x 32x32 (split, interleave)"),
    ("FalconForCausalLM", {**FALCON, "multi_query": True}, "query_key_value", "32x32 + 2 x 8x32 (split)"),
    ("FalconForCausalLM", {**FALCON, "multi_query": False}, "query_key_value", "3 x 32x32 (split, interleave)"),
    (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        "32x32 + 2 x 16x32 (split, interleave)",
    ),
    ("GPTBigCodeForCausalLM", {**OF_GPT2, "multi_query": True}, "c_attn", "32x32 + 2 x 8x32 (split)"),
    ("GPTBigCodeForCausalLM", {**OF_GPT2, "multi_query": False}, "c_attn", "3 x 32x32 (split, interleave)"),
    ("Phi3ForCausalLM", GQA, "qkv_proj", "32x32 + 2 x 16x32 (split)"),
    ("MptForCausalLM", {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 1}, "Wqkv", "3 x 32x32 (split)"),
    ("PersimmonForCausalLM", SMALL, "query_key_value", "3 x 32x32 (split, interleave)"),
    ("CodeGenForCausalLM", {**OF_GPT2, "rotary_dim": 4}, "qkv_proj", "3 x 32x32 (split, interleave)"),
    ("ModernBertForMaskedLM", SMALL, "Wqkv", "3 x 32x32 (split)"),
    (
        "DbrxForCausalLM",
        {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 1, "attn_config": DBRX_ATTENTION},
        "Wqkv",
        "32x32 + 2 x 16x32 (split)",
    ),
]


def made(name: str, config: dict[str, Any]) -> nn.Module:
    """A model with random weights and no biases."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model: nn.Module = cls(cls.config_class(**config, attn_implementation="eager"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            if "bias" in key:
                parameter.zero_()
    return model.eval()


def member_of(model: nn.Module, part: str, **options: Any) -> Member:
    found = [m for group in param_groups(model, **options) for m in group[MEMBERS]]
    return next(m for m in found if f".{part}" in m.spec.name and len(m.spec.shape) > 1)


@contextmanager
def zeroed(member: Member, *blocks: tuple[int, slice | int]) -> Iterator[None]:
    """Some matrices of a parameter are zero: block and which of it."""
    assert member.view is not None
    kept = member.parameter.detach().clone()
    parts = [part.clone() for part in member.view.unpack(kept.flatten())]
    for number, which in blocks:
        parts[number][which] = 0
    with torch.no_grad():
        member.view.pack_into(parts, member.parameter.data.view(-1))
        yield
        member.parameter.copy_(kept)


def input_of(model: nn.Module, module: nn.Module) -> Tensor:
    """What a module of the model takes in when the model reads a few tokens."""
    return output_of(model, module, is_input=True)


def output_of(model: nn.Module, module: nn.Module, *, is_input: bool = False) -> Tensor:
    """What it puts out."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: Any, result: Any) -> None:
        value = given if is_input else result
        seen.append((value[0] if isinstance(value, tuple) else value).detach().clone())

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 7, 11, 13, 17]]))
    handle.remove()
    return seen[0]


def holder_of(model: nn.Module, member: Member, depth: int) -> nn.Module:
    return model.get_submodule(".".join(member.spec.name.split(".")[:-depth]))


@pytest.mark.parametrize(("name", "config", "part", "seen"), QKV)
def test_fused_queries_keys_and_values_are_what_the_model_takes_for_them(
    name: str, config: dict[str, Any], part: str, seen: str
) -> None:
    """Without values nothing is put out; zero queries and zero keys are the same, attention to all alike."""
    model = made(name, config)
    member = member_of(model, part)
    assert member.view is not None
    assert member.view.describe() == seen
    projection = next(child for key, child in holder_of(model, member, 2).named_children() if key in OUTS)
    whole = input_of(model, projection)
    found = []
    for number in range(3):
        with zeroed(member, (number, slice(None))):
            found.append(input_of(model, projection))
    queries, *others = found
    keys, values = reversed(others) if name == "CodeGenForCausalLM" else others
    assert values.abs().max() == 0
    torch.testing.assert_close(queries, keys)
    assert (queries - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "config", "part", "seen"),
    [
        ("Phi3ForCausalLM", GQA, "gate_up_proj", "2 x 24x32 (split)"),
        ("GlmForCausalLM", GQA | {"head_dim": 8}, "gate_up_proj", "2 x 24x32 (split)"),
        ("ModernBertForMaskedLM", SMALL, "Wi", "2 x 24x32 (split)"),
        ("MixtralForCausalLM", MOE, "experts.gate_up_proj", "6 x 24x32 (split, batch_dims)"),
        ("Qwen3MoeForCausalLM", MOE, "experts.gate_up_proj", "6 x 24x32 (split, batch_dims)"),
        ("JetMoeForCausalLM", {**MOE, "kv_channels": 8}, "mlp.input_linear", "6 x 24x32 (split, batch_dims)"),
        ("GptOssForCausalLM", MOE, "experts.gate_up_proj", "6 x 24x32 (transpose, split, interleave, batch_dims)"),
        ("Llama4ForCausalLM", MOE, "experts.gate_up_proj", "6 x 24x32 (transpose, split, batch_dims)"),
        (
            "DeepseekV3ForCausalLM",
            {**SMALL, **MLA, "first_k_dense_replace": 0, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
            | {"num_experts_per_tok": 2, "moe_intermediate_size": 24},
            "experts.gate_up_proj",
            "8 x 24x32 (split, batch_dims)",
        ),
    ],
)
def test_gates_and_ups_are_apart_expert_by_expert(name: str, config: dict[str, Any], part: str, seen: str) -> None:
    """A gate of zero lets nothing through."""
    model = made(name, config)
    member = member_of(model, part)
    assert member.view is not None
    assert member.view.describe() == seen
    mlp = holder_of(model, member, 1 if "experts" in part else 2)
    assert output_of(model, mlp).abs().max() > 1e-3
    with zeroed(member, (0, slice(None))):
        assert output_of(model, mlp).abs().max() == 0
    if "experts" in part:
        with zeroed(member_of(model, "experts.down_proj"), *[(0, slice(1, None))]):
            assert output_of(model, mlp).abs().max() > 1e-4, "the first expert is left"


def test_linear_attention_of_qwen3_next_falls_into_its_four() -> None:
    model = made("Qwen3NextForCausalLM", {**MOE, **DELTA, "head_dim": 8})
    member = member_of(model, "in_proj_qkvz")
    assert member.view is not None
    assert member.view.describe() == "2 x 16x32 + 2 x 24x32 (split, interleave)"
    layer = holder_of(model, member, 2)
    for number in range(4):
        with zeroed(member, (number, slice(None))):
            assert output_of(model, layer).abs().max() == 0
    heads = member_of(model, "in_proj_qkvz", heads="auto").view
    assert heads is not None
    assert heads.matrices() == [(2, 8, 32), (2, 8, 32), (4, 6, 32), (4, 6, 32)]


def test_a_tower_of_vision_and_torchs_own_attention_have_thirds() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = VisionAttention(Qwen2VLVisionConfig(embed_dim=16, num_heads=2, attn_implementation="eager"))
            self.mha = nn.MultiheadAttention(16, 2, bias=False)

    torch.manual_seed(0)
    tower, x = Tower(), torch.randn(5, 16)
    nn.init.zeros_(tower.attn.qkv.bias)
    nn.init.zeros_(tower.attn.proj.bias)
    around, ends = (torch.ones(5, 8), torch.zeros(5, 8)), torch.tensor([0, 5])
    runs = {
        "qkv": lambda: tower.attn(x, cu_seqlens=ends, position_embeddings=around),
        "in_proj_weight": lambda: tower.mha(x, x, x)[0],
    }
    for name, run in runs.items():
        member = member_of(tower, name)
        assert member.view is not None
        assert member.view.describe() == "3 x 16x16 (split)"
        found = []
        for number in range(3):
            with torch.no_grad(), zeroed(member, (number, slice(None))):
                found.append(run())
        assert found[2].abs().max() == 0
        torch.testing.assert_close(found[0], found[1])


#: Class, config, and of each projection its heads by part: a list of how many output heads one of them feeds.
PER_HEAD: list[tuple[str, dict[str, Any], str, dict[str, list[tuple[int, int]]]]] = [
    ("LlamaForCausalLM", GQA, "o_proj", {"q_proj": [(4, 8)], "k_proj": [(2, 8)], "v_proj": [(2, 8)]}),
    ("GPT2LMHeadModel", OF_GPT2, "c_proj", {"c_attn": [(4, 8)] * 3}),
    ("GPTNeoXForCausalLM", SMALL, "dense", {"query_key_value": [(4, 8)] * 3}),
    ("Phi3ForCausalLM", GQA, "o_proj", {"qkv_proj": [(4, 8), (2, 8), (2, 8)]}),
    ("FalconForCausalLM", QKV[5][1], "dense", {"query_key_value": [(4, 8), (2, 8), (2, 8)]}),
    ("CodeGenForCausalLM", QKV[11][1], "out_proj", {"qkv_proj": [(4, 8)] * 3}),
    ("OPTForCausalLM", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 32}, "out_proj", {"q_proj": [(4, 8)]}),
    (
        "DeepseekV3ForCausalLM",
        {**SMALL, **MLA, "first_k_dense_replace": 1},
        "o_proj",
        {"q_b_proj": [(4, 12)], "kv_b_proj": [(4, 8), (4, 6)]},
    ),
]


@pytest.mark.parametrize(("name", "config", "out", "expected"), PER_HEAD)
def test_a_head_of_a_projection_touches_its_own_columns_alone(
    name: str, config: dict[str, Any], out: str, expected: dict[str, list[tuple[int, int]]]
) -> None:
    """What goes into the output projection, seen by head, changes in a zeroed matrix' heads and nowhere else."""
    model = made(name, config)
    for part, sizes in expected.items():
        member = member_of(model, part, heads="auto")
        assert member.view is not None
        assert [(count, rows) for count, rows, _ in member.view.matrices()] == sizes
        projection = holder_of(model, member, 2).get_submodule(out)
        whole = input_of(model, projection)
        for number, (count, _) in enumerate(sizes):
            with zeroed(member, (number, 1)):
                changed = input_of(model, projection)
            by_head = (changed - whole).abs().unflatten(-1, (4, -1)).amax(dim=(0, 1, 3))
            own = torch.arange(4) // (4 // count) == 1
            assert by_head[own].min() > 1e-5
            assert by_head[~own].max() < 1e-6


def test_heads_of_a_config_that_does_not_fit_are_left_and_said() -> None:
    model = made("LlamaForCausalLM", GQA)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.k_proj = nn.Linear(32, 24, bias=False)
    left = member_of(model, "k_proj", heads="auto")
    assert left.view is not None
    assert (left.view.describe(), left.derived) == ("24x32", "whole: its rows are not the config's heads")
    with pytest.raises(UserError, match=r'heads is "auto", and no module.*write views: \[\{"match": "q_proj"'):
        param_groups(nn.Sequential(nn.Linear(4, 4)), heads="auto")
    for wrong in (12, 1, "all"):
        with pytest.raises(UserError, match='write "auto", or a number into a view'):
            param_groups(model, heads=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match='leave "views_defaults": false out'):
        param_groups(model, heads="auto", views_defaults=False)


def test_what_is_written_wins_over_what_is_read_off_the_model() -> None:
    model = made("GPT2LMHeadModel", OF_GPT2)
    whole = member_of(model, "c_attn", views=[{"match": "c_attn"}])
    assert whole.view is not None
    assert (whole.view.describe(), whole.derived) == ("96x32 (transpose)", "")
    off = member_of(model, "c_attn", views_defaults=False)
    assert off.view == whole.view
    moe = made("MixtralForCausalLM", MOE)
    assert member_of(moe, "experts.gate_up_proj", views_defaults=False).reason == "stack without a view"
    kept = member_of(moe, "experts.gate_up_proj", views=[{"match": "experts", "batch_dims": 1}])
    assert kept.view is not None
    assert kept.view.describe() == "3 x 48x32 (batch_dims)", "as earlier releases saw it"


@pytest.mark.parametrize(
    ("name", "config", "part", "seen"),
    [
        ("GPT2LMHeadModel", OF_GPT2, "c_attn", "3 x 32x4 (split)"),
        ("GPTNeoXForCausalLM", SMALL, "query_key_value", "3 x 32x4 (split, interleave)"),
        ("Phi3ForCausalLM", GQA, "qkv_proj", "32x4 + 2 x 16x4 (split)"),
    ],
)
def test_loras_b_falls_apart_as_the_layer_it_adds_to(name: str, config: dict[str, Any], part: str, seen: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=[part], fan_in_fan_out=name.startswith("GPT2"))
    model = peft.get_peft_model(made(name, config), settings)
    a, b = (member_of(model, f"{part}.lora_{side}") for side in "AB")
    assert a.view is not None
    assert b.view is not None
    assert (a.view.describe(), a.derived) == ("4x32", "")
    assert (b.view.describe(), b.derived) == (seen, "LoRA's B of q, k and v apart")
    nn.init.normal_(b.parameter)
    projection = next(child for key, child in holder_of(model, b, 4).named_children() if key in OUTS)
    with torch.no_grad():
        model.get_parameter(b.spec.name.replace("lora_B.default", "base_layer")).zero_()
    assert input_of(model, projection).abs().max() > 1e-3
    with zeroed(b, (2, slice(None))):
        assert input_of(model, projection).abs().max() == 0, "it alone brought values"


def test_loras_a_of_stacked_experts_is_one_for_each() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = peft.get_peft_model(made("MixtralForCausalLM", MOE), settings)
    a, b = (member_of(model, f"mlp.experts.lora_{side}") for side in "AB")
    assert a.view is not None
    assert b.view is not None
    assert (a.view.describe(), a.derived) == ("3 x 4x32 (heads)", "LoRA's A of 3 experts")
    assert b.view.describe() == "48x12"


class Block(nn.Module):
    """Somebody's own, with names that say what is fused and not how."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate_up, self.attn = nn.Linear(8, 24), nn.Linear(8, 32), nn.MultiheadAttention(8, 2)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 32, 8))
        self.experts.w2 = nn.Parameter(torch.zeros(3, 8, 16))
        self.experts.conv = nn.Conv1d(4, 6, 3)


def test_a_layout_that_is_not_known_is_not_guessed() -> None:
    model = nn.Sequential(Block(), Block())
    found = {m.spec.name: m for group in param_groups(model) for m in group[MEMBERS]}
    seen = {name[2:]: (m.view.describe(), m.derived) for name, m in found.items() if m.view is not None}
    unknown = "fused in a way that is not known"
    assert seen == {
        "qkv.weight": ("24x8", unknown),
        "gate_up.weight": ("32x8", unknown),
        "attn.in_proj_weight": ("3 x 8x8 (split)", "q, k and v apart"),
        "attn.out_proj.weight": ("8x8", ""),
        "experts.gate_up_proj": ("3 x 32x8 (batch_dims)", f"3 experts, gate and up {unknown}"),
        "experts.w2": ("3 x 8x16 (batch_dims)", "3 experts"),
        "experts.conv.weight": ("6x12 (conv)", ""),
    }


def test_a_rule_that_chooses_rows_takes_gates_and_ups_that_take_turns_row_by_row_as_one_matrix() -> None:
    """No row could be left out of a turn of one; heads that take turns have rows enough."""
    model = made("GptOssForCausalLM", MOE)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = MatrixView(shape=(3, 32, 48), batch_dims=1, transpose=True)
    seen = {m.spec.name: m for members in ds_optim.Dion2(param_groups(model)).members for m in members}
    assert seen[name].view == whole
    assert seen[name].derived == "one matrix for rows to be chosen of: 3 experts, gate and up apart"
    plan = plan_optimizer(shape_of_module("oss", model), "dion2")
    assert {p.name: p.view for p in plan.groups[0].parameters}[name] == whole
    written = [{"match": "gate_up_proj$", "split": [24, 24], "interleave": 24, "batch_dims": 1}]
    with pytest.raises(UserError, match=r"gate_up_proj has parts that take turns row by row.*leave interleave out"):
        ds_optim.Dion2(param_groups(model, views=written))
    neox = ds_optim.Dion2(param_groups(made("GPTNeoXForCausalLM", SMALL)))
    views = {m.spec.name: m.view for members in neox.members for m in members}
    apart = views["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert apart is not None
    assert apart.describe() == "3 x 32x32 (split, interleave)"
    assert apart.selected(0.5).describe() == "3 x 16x32 (split, interleave)"


@pytest.mark.parametrize(("name", "config"), [("GptOssForCausalLM", MOE), ("GPT2LMHeadModel", OF_GPT2)])
def test_shapes_under_zero_init_are_the_whole_ones(name: str, config: dict[str, Any]) -> None:
    model, whole = made(name, config), made(name, config)
    for p in model.parameters():
        p.ds_shape, p.ds_numel = p.shape, p.numel()  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    found, expected = (
        {m.spec.name: m.view for group in param_groups(one, heads="auto") for m in group[MEMBERS]}
        for one in (model, whole)
    )
    assert found == expected
