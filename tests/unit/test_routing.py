"""Names and shapes send each parameter to a rule and a view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.routes import routes
from ds_optim.optimizers.routing import MEMBERS, param_groups


def roles(model: nn.Module, **options: Any) -> dict[str, str]:
    return {m.spec.name: group["role"] for group in param_groups(model, **options) for m in group[MEMBERS]}


def views(model: nn.Module, **options: Any) -> dict[str, str]:
    groups = param_groups(model, **options)
    return {m.spec.name: m.view.describe() for group in groups for m in group[MEMBERS] if m.view is not None}


class Conv1D(nn.Module):
    """By its name transformers' layer of GPT-2: fan-in x fan-out."""

    def __init__(self, fan_out: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 6)
        self.fused = Conv1D(9, 4)
        self.conv = nn.Conv2d(3, 5, 2)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.zeros(()))
        self.cube = nn.Parameter(torch.zeros(2, 3, 4))
        self.lm_head = nn.Linear(4, 7, bias=False)


def test_roles_by_shape_module_and_name() -> None:
    assert roles(Zoo()) == {
        "body.weight": "matrix",
        "fused.weight": "matrix",
        "conv.weight": "matrix",
        "tokens.weight": "aux",  # an embedding by its module, whatever its name
        "cube": "aux",
        "lm_head.weight": "aux",
        "scale": "vector",
        "body.bias": "vector",
        "fused.bias": "vector",
        "conv.bias": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
    }


def test_groups_are_named_ordered_and_disjoint() -> None:
    model = Zoo()
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["matrix", "aux", "vector"]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    for group in groups:
        assert [id(m.parameter) for m in group[MEMBERS]] == [id(p) for p in group["params"]]
    only = nn.LayerNorm(3)
    assert [group["name"] for group in param_groups(only)] == ["vector"]


def test_views_by_layer_kind() -> None:
    assert views(Zoo()) == {
        "body.weight": "6x4",
        "fused.weight": "9x4 (transpose)",
        "conv.weight": "5x12 (conv)",
    }


def test_the_first_view_that_matches_counts() -> None:
    asked = [
        {"match": "fused", "split": [3, 3, 3]},
        {"match": "weight", "heads": 1},
        {"match": "cube", "batch_dims": 1},
    ]
    found = views(Zoo(), views=asked)
    assert found["fused.weight"] == "3 x 3x4 (transpose, split)"
    assert found["body.weight"] == "6x4 (heads)"
    assert found["cube"] == "2 x 3x4 (batch_dims)", "a view makes a matrix of what has three dimensions"
    reverse = views(Zoo(), views=[{"match": "weight", "heads": 1}, {"match": "fused", "split": [3, 3, 3]}])
    assert reverse["fused.weight"] == "9x4 (transpose, heads)"
    stored = views(Zoo(), views=[{"match": "fused", "transpose": False}])
    assert stored["fused.weight"] == "4x9"


def test_a_view_for_a_layer_leaves_its_bias_a_vector() -> None:
    model = Zoo()
    model.experts = nn.ParameterDict({"weight": torch.zeros(2, 3, 4), "bias": torch.zeros(2, 3)})
    asked = [{"match": "fused", "split": [3, 3, 3]}, {"match": "experts", "batch_dims": 1}]
    found = roles(model, views=asked)
    assert (found["fused.weight"], found["fused.bias"]) == ("matrix", "vector")
    assert (found["experts.weight"], found["experts.bias"]) == ("matrix", "aux")
    assert views(model, views=asked)["experts.weight"] == "2 x 3x4 (batch_dims)"
    with pytest.raises(UserError, match="'norm' matches no parameter"):
        roles(model, views=[{"match": "norm", "heads": 2}])
    with pytest.raises(UserError, match=r"views: cube.*needs two dimensions"):
        roles(model, views=[{"match": "cube", "batch_dims": 3}])


def test_a_view_does_not_undo_an_exclusion() -> None:
    assert roles(Zoo(), matrix_exclude=["body"], views=[{"match": "body", "heads": 2}])["body.weight"] == "aux"


def test_matrix_exclude_adds_to_the_defaults() -> None:
    found = roles(Zoo(), matrix_exclude=["^body"])
    assert found["body.weight"] == found["tokens.weight"] == found["lm_head.weight"] == "aux"
    alone = roles(Zoo(), matrix_exclude=["^body"], matrix_exclude_defaults=False)
    assert alone["body.weight"] == "aux"
    assert alone["tokens.weight"] == alone["lm_head.weight"] == "matrix"


def test_a_tied_head_is_routed_once_by_either_name() -> None:
    model = Zoo()
    model.lm_head.weight = model.tokens.weight
    found = roles(model, matrix_exclude=["lm_head"])
    assert found["tokens.weight"] == "aux", "it is the head, under its first name"
    assert "lm_head.weight" not in found
    plain = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    plain["second"].weight = plain["first"].weight
    assert roles(plain, matrix_exclude=["second"])["first.weight"] == "aux"
    assert views(plain, views=[{"match": "second.weight", "heads": 3}])["first.weight"] == "3 x 1x3 (heads)"


def test_frozen_and_empty_parameters_have_no_group_and_do_match_patterns() -> None:
    model = Zoo()
    model.body.weight.requires_grad_(False)
    model.empty = nn.Parameter(torch.zeros(0, 4))
    found = roles(model, matrix_exclude=["body", "empty"])
    assert "body.weight" not in found
    assert "empty" not in found
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        roles(model, matrix_exclude=["body", "nothing"])
    model.requires_grad_(False)
    assert param_groups(model) == []
    with pytest.raises(UserError, match="no parameters"):
        ds_optim.Muon(param_groups(model))
    with pytest.raises(UserError, match="none of the parameters is trainable"):
        ds_optim.Lion(model.parameters())


def test_only_the_parameters_asked_for() -> None:
    model = Zoo()
    assert roles(model, parameters=[model.body.weight, model.norm.bias]) == {
        "body.weight": "matrix",
        "norm.bias": "vector",
    }
    with pytest.raises(UserError, match="not the model's"):
        roles(model, parameters=[nn.Parameter(torch.zeros(3))])


def test_shapes_under_zero_init_are_the_whole_ones() -> None:
    model = Zoo()
    for p in model.parameters():
        p.ds_shape, p.ds_numel = p.shape, p.numel()  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    reference = Zoo()
    assert roles(model) == roles(reference)
    assert views(model) == views(reference)
    shapes = {m.spec.name: m.spec.shape for group in param_groups(model) for m in group[MEMBERS]}
    assert shapes == {name: tuple(p.shape) for name, p in reference.named_parameters()}


def test_bare_parameters_take_no_matrix_rule_and_skip_the_frozen() -> None:
    model = Zoo()
    model.norm.requires_grad_(False)
    for given in (list(model.parameters()), list(model.named_parameters())):
        optimizer = ds_optim.Lion(given)
        assert [g["name"] for g in optimizer.param_groups] == ["aux", "vector"]
        listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert listed == {id(p) for p in model.parameters() if p.requires_grad}
        assert [g["weight_decay"] for g in optimizer.param_groups] == [1.0, 0.0]


def test_gpt2_gets_a_sensible_route() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    found = roles(model)
    layer = "transformer.h.1"
    assert {name for name, role in found.items() if role == "matrix"} == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {name for name, role in found.items() if role == "aux"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    seen = views(model, views=[{"match": r"c_attn\.weight", "split": [8, 8, 8]}])
    assert seen[f"{layer}.attn.c_attn.weight"] == "3 x 8x8 (transpose, split)"
    assert seen[f"{layer}.attn.c_proj.weight"] == "8x8 (transpose)"
    assert seen[f"{layer}.mlp.c_fc.weight"] == "32x8 (transpose)", "rows are the fan-out"
    assert seen[f"{layer}.mlp.c_proj.weight"] == "8x32 (transpose)"


def test_qwen3_gets_a_sensible_route() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for tied in (False, True):
        shape = Qwen3Config(
            vocab_size=31,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=tied,
        )
        model = Qwen3ForCausalLM(shape)
        found = roles(model)
        matrices = {name for name, role in found.items() if role == "matrix"}
        projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        projections += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        assert matrices == {f"model.layers.{i}.{part}.weight" for i in range(2) for part in projections}
        heads = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
        assert {name for name, role in found.items() if role == "aux"} == heads
        assert all("norm" in name for name, role in found.items() if role == "vector")
        by_head = views(model, views=[{"match": "q_proj", "heads": 2}])
        assert by_head["model.layers.0.self_attn.q_proj.weight"] == "2 x 4x8 (heads)"
        assert by_head["model.layers.0.self_attn.k_proj.weight"] == "4x8"


def test_routes_say_what_each_parameter_got() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    said = list(routes(ds_optim.LionMuon(param_groups(model), lr=1e-2, sign_lr_ratio=5)))
    assert said[0] == "ds_optim: LionMuon"
    assert "  matrix: lion_muon, lr 0.01, decay 0.1, 1,536 parameters" in said
    assert "  aux: lion, lr 0.002, decay 0.1, 312 parameters" in said
    assert "    transformer.h.*.attn.c_attn.weight (2): 3 x 8x8 (transpose, split), q, k and v apart" in said
    assert "    transformer.wte.weight: 31x8, embedding" in said
    said = list(routes(ds_optim.Muon(param_groups(model, matrix_exclude=["mlp"]))))
    assert "    transformer.h.*.mlp.c_fc.weight (2): 8x32, matrix_exclude 'mlp'" in said
    assert not any("warning" in line for line in said)
