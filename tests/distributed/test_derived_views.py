"""Matrices that are read off models, under ZeRO on two ranks: each steps as it would alone, cut out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from tests.unit.test_derived_views import FALCON, GQA, MLA, MOE, OF_GPT2, SMALL, made

from .harness import run_ranks
from .small_runs import Cell, full_weights, start

pytestmark = pytest.mark.full

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "polar": {"steps": 5, "dtype": "float32"}}
GROUPED = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
DEEPSEEK = {**SMALL, **MLA, "num_hidden_layers": 1, "first_k_dense_replace": 1}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", OF_GPT2),
    "neox": ("GPTNeoXForCausalLM", SMALL),
    "falcon": ("FalconForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", GQA),
    "mixtral": ("MixtralForCausalLM", MOE),
    "oss": ("GptOssForCausalLM", MOE),
    "deepseek": ("DeepseekV3ForCausalLM", DEEPSEEK),
}
CELLS = [(1, None), (2, "auto"), (3, None), (3, "auto")]


def by_hand(name: str, w: Tensor) -> dict[str, list[Tensor]] | None:
    """A weight's matrices as (fan-out, fan-in) views: whole ones, and those of queries, keys and values by head."""
    model, *_, last = name.split(".")
    leaf = name.split(".")[-2] if last == "weight" else last
    if leaf == "c_attn":
        q, k, v = w.t()[:32], w.t()[32:64], w.t()[64:]
        return {"whole": [q, k, v], "heads": [part[8 * h : 8 * h + 8] for part in (q, k, v) for h in range(4)]}
    if model == "neox" and leaf == "query_key_value":  # q, k and v of a head, 8 rows each
        rows = {part: [w[24 * h + 8 * part : 24 * h + 8 * part + 8] for h in range(4)] for part in range(3)}
        return {"whole": [torch.cat(heads) for heads in rows.values()], "heads": [*rows[0], *rows[1], *rows[2]]}
    if model == "falcon" and leaf == "query_key_value":  # two queries, their key, their value; and again
        q = [w[32 * g + 8 * h : 32 * g + 8 * h + 8] for g in range(2) for h in range(2)]
        k, v = ([w[32 * g + at : 32 * g + at + 8] for g in range(2)] for at in (16, 24))
        return {"whole": [torch.cat(heads) for heads in (q, k, v)], "heads": [*q, *k, *v]}
    if leaf == "qkv_proj":
        parts = [w[:32], w[32:48], w[48:]]
        return {"whole": parts, "heads": [w[at : at + 8] for at in range(0, 64, 8)]}
    if model == "phi3" and leaf == "gate_up_proj":
        return {"whole": [w[:24], w[24:]]}
    if leaf == "gate_up_proj" and model == "oss":  # gates and ups take turns, and experts are stored fan-in first
        return {"whole": [w[e][:, at::2].t() for e in range(3) for at in (0, 1)]}
    if leaf == "gate_up_proj" and model == "mixtral":
        return {"whole": [w[e][at : at + 24] for e in range(3) for at in (0, 24)]}
    if leaf == "down_proj" and w.dim() == 3:
        return {"whole": [w[e].t() if model == "oss" else w[e] for e in range(3)]}
    if leaf == "kv_b_proj":  # a head's key without position, 8 rows, and its value, 6
        heads = [w[14 * h + at : 14 * h + at + size] for at, size in ((0, 8), (8, 6)) for h in range(4)]
        return {"whole": [w], "heads": heads}
    if leaf == "q_b_proj":
        return {"whole": [w], "heads": [w[12 * h : 12 * h + 12] for h in range(4)]}
    return None


class Several(nn.Module):
    """Models side by side, with one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict({key: made(*model) for key, model in MODELS.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        losses = [model(input_ids=tokens, labels=tokens).loss for model in self.models.values()]
        return torch.stack(losses).sum()


def tokens() -> Tensor:
    return torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(7))


def under_zero(rank: int, world_size: int, cells: list[tuple[int, str | None]]) -> list[dict[str, Tensor]]:
    found = []
    for stage, heads in cells:
        params = {**OPTIONS, **({} if heads is None else {"heads": heads})}
        engine = start(Cell(stage=stage), world_size, {"type": "Muon", "params": params}, model=Several())
        engine.backward(engine(tokens()))  # the same on both ranks, so that the mean is its gradient
        engine.step()
        found.append(full_weights(engine))
    return found


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Tensor]]:
    return run_ranks(2, under_zero, CELLS)[0]


def alone(matrix: Tensor, gradient: Tensor) -> Tensor:
    """How far Muon, unsharded, moves a matrix that is a layer of its own."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data.copy_(matrix)
    layer.weight.grad = gradient.contiguous()
    ds_optim.Muon(ds_optim.param_groups(layer), **OPTIONS).step()
    return layer.weight.detach() - matrix


@pytest.mark.parametrize("number", range(len(CELLS)), ids=[f"z{stage}-{heads}" for stage, heads in CELLS])
def test_each_matrix_steps_as_it_would_alone(number: int, trained: list[dict[str, Tensor]]) -> None:
    _, heads = CELLS[number]
    model = Several()
    model(tokens()).backward()
    seen: set[str] = set()
    for key, parameter in model.named_parameters():
        name = key.removeprefix("models.")
        before = by_hand(name, parameter.detach())
        if before is None:
            continue
        seen.add(name.removesuffix(".weight").split(".")[-1])
        how = "heads" if heads and "heads" in before else "whole"
        now, slopes = by_hand(name, trained[number][key]), by_hand(name, parameter.grad)  # type: ignore[arg-type]
        assert now is not None
        assert slopes is not None
        for old, new, slope in zip(before[how], now[how], slopes[how], strict=True):
            expected = alone(old, slope)
            assert float((new - old - expected).norm()) < 2e-3 * float(expected.norm()), name
    assert seen == {"c_attn", "query_key_value", "qkv_proj", "gate_up_proj", "down_proj", "kv_b_proj", "q_b_proj"}
