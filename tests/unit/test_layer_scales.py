"""LASM's default layer scales, by the names that models of Llama's, Qwen's, GPT-2's and GPT-NeoX's kind give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_optim.optimizers.lasm import LAYER_SCALES
from ds_optim.optimizers.layer_scales import layer_scale
from tests.stepping import build, take_steps

SCALES_BY_NAME = {
    "model.embed_tokens.weight": 0.5,
    "model.layers.0.input_layernorm.weight": 1.0,
    "model.layers.0.post_attention_layernorm.weight": 1.0,
    "model.layers.0.self_attn.q_proj.weight": 1.5,
    "model.layers.11.self_attn.o_proj.weight": 1.5,
    "model.layers.0.self_attn.q_norm.weight": 1.5,
    "model.layers.0.mlp.up_proj.weight": 1.0,
    "model.layers.0.mlp.down_proj.weight": 1.0,
    "model.norm.weight": 1.0,
    "lm_head.weight": 1.0,
    "transformer.wte.weight": 0.5,
    "transformer.wpe.weight": 0.5,
    "transformer.h.0.attn.c_attn.weight": 1.5,
    "transformer.h.0.attn.c_proj.bias": 1.5,
    "transformer.h.0.mlp.c_fc.weight": 1.0,
    "transformer.h.0.ln_1.weight": 1.0,
    "transformer.ln_f.weight": 1.0,
    "gpt_neox.embed_in.weight": 0.5,
    "gpt_neox.layers.0.attention.dense.weight": 1.5,
    "embed_out.weight": 1.0,
}


class Named(nn.Module):
    """Vectors of 0 under any dotted names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("variance", ["tensor", "element"])
def test_lasm_scales_layers_of_llama_qwen_and_gpt2_by_their_names(variance: str) -> None:
    model, lr = Named(list(SCALES_BY_NAME)), 2.0**-10
    grads = {name: torch.ones(3) for name in SCALES_BY_NAME}
    take_steps(model, build("LASM", model, lr=lr, variance=variance), [grads])
    moved = {name: -p.tolist()[0] / lr for name, p in model.named_parameters()}
    assert moved == SCALES_BY_NAME
    assert {name: layer_scale(LAYER_SCALES, name) for name in moved} == SCALES_BY_NAME


def test_lasm_scales_a_tied_head_as_the_embedding_that_it_is() -> None:
    model = Named(["model.embed_tokens.weight", "lm_head.weight"])
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    take_steps(model, build("LASM", model, lr=1.0), [{"model.embed_tokens.weight": torch.ones(3)}])
    assert [p.tolist() for p in model.parameters()] == [[-0.5] * 3]
