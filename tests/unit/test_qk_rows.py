"""QK-clip of weights that hold queries, keys and values, in models of transformers: their own projections tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim

HEADS, SIZE, LAYER = 4, 3, "0"
WIDTH = HEADS * SIZE
TAU, ALPHA = 10.0, 0.25
LARGEST = torch.tensor([5.0, 20.0, 40.0, 10.0])
Parts = tuple[Tensor, Tensor, Tensor]
"""What a projection gives of queries, keys and values, (tokens, heads, size)."""


def gpt2() -> tuple[nn.Module, str, int, Any]:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=1, vocab_size=8, n_positions=8))
    return model, "h.0.attn.c_attn", HEADS, lambda out: [part.view(-1, HEADS, SIZE) for part in out.split(WIDTH, -1)]


def gpt_neox() -> tuple[nn.Module, str, int, Any]:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 8}
    model = GPTNeoXModel(GPTNeoXConfig(**shape, vocab_size=8))
    name = "layers.0.attention.query_key_value"
    return model, name, HEADS, lambda out: out.view(-1, HEADS, 3 * SIZE).chunk(3, dim=-1)


def phi3() -> tuple[nn.Module, str, int, Any]:
    from transformers import Phi3Config, Phi3Model

    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 8}
    model = Phi3Model(Phi3Config(**shape, num_key_value_heads=2, vocab_size=8, pad_token_id=0))
    sizes = [WIDTH, 2 * SIZE, 2 * SIZE]
    name = "layers.0.self_attn.qkv_proj"
    return (
        model,
        name,
        2,
        lambda out: [part.view(-1, p // SIZE, SIZE) for part, p in zip(out.split(sizes, -1), sizes, strict=True)],
    )


@pytest.mark.parametrize("made", [gpt2, gpt_neox, phi3])
def test_queries_and_keys_of_a_fused_weight_shrink_by_head(made: Any) -> None:
    torch.manual_seed(0)
    model, name, key_heads, cut = made()
    projection = model.get_submodule(name)
    views = [{"match": name.replace(".", r"\."), "transpose": True}] if made is gpt2 else []
    optimizer = ds_optim.Lion(ds_optim.param_groups(model, views=views), lr=1e-30, weight_decay=0.0)
    options = {"key_heads": key_heads, "tau": TAU, "alpha": ALPHA, "interleaved": made is gpt_neox}
    clip = ds_optim.QKClip(optimizer, {LAYER: f"{name}.weight"}, HEADS, **options)
    if (bias := getattr(projection, "bias", None)) is not None:
        nn.init.normal_(bias)
    tokens = torch.randn(5, WIDTH)
    with torch.no_grad():
        before: Parts = cut(projection(tokens).clone())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        clip.observe(LAYER, LARGEST)
        optimizer.step()
        after: Parts = cut(projection(tokens))
    queries = (TAU / LARGEST).clamp(max=1)
    keys = queries.view(key_heads, -1).amin(dim=1)
    for was, now, factors in zip(
        before, after, (queries**ALPHA, keys ** (1 - ALPHA), torch.ones(key_heads)), strict=True
    ):
        torch.testing.assert_close(now, was * factors[:, None], rtol=1e-5, atol=1e-6)


def test_queries_that_share_a_key_stand_before_it_where_they_are_interleaved() -> None:
    model = nn.Linear(2, 8, bias=False)
    nn.init.ones_(model.weight)
    optimizer = ds_optim.Lion(ds_optim.param_groups(model), lr=1e-30, weight_decay=0.0)
    clip = ds_optim.QKClip(optimizer, {LAYER: "weight"}, 4, key_heads=2, tau=1.0, alpha=0.5, interleaved=True)
    clip.observe(LAYER, torch.tensor([1.0, 4.0, 16.0, 1.0]))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    rows = model.weight.detach()[:, 0].tolist()  # of each of two groups: two heads of queries, the key, the values
    assert rows == [1, 0.5, 0.5, 1, 0.25, 1, 0.25, 1]
