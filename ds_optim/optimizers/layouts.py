"""How models fuse several matrices into one parameter: what their own forward passes say, by family and layer.

Shapes cannot tell queries, keys and values that lie one after the other from such that take turns head by head; so a
layout is known for the modules of ``transformers`` (by the package that defines them) and of torch, and not guessed
for others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "encoder_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv")
_WIDTH = ("hidden_size", "embed_dim", "n_embd", "d_model")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Matrices that lie in one parameter, along its rows (fan-out).

    parts: what they are, in order. rows, heads: of each. turns: see ``MatrixView.interleave``.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    heads: tuple[int, ...]
    turns: int = 0

    def options(self, by_head: bool) -> dict[str, Any]:
        """Options of a view; empty where nothing is cut."""
        found: dict[str, Any] = {}
        if len(self.rows) > 1:
            found["split"] = list(self.rows)
            if self.turns > 1:
                found["interleave"] = self.turns
        if by_head and max(self.heads) > 1:
            found["heads"] = list(self.heads)
        return found


class Widths:
    """The numbers of an attention layer, by its own attributes or its model's config; None for what neither has."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._sources = (module, config)
        self.heads = self.first(*_HEADS)
        self.key_heads = self.first(*_KEY_HEADS) or self.heads
        width = self.first(*_WIDTH)
        self.head_size = self.first(*_HEAD_SIZE) or (width // self.heads if width and self.heads else None)

    def first(self, *names: str) -> int | None:
        """The first of these attributes that is a number above 0, of the layer before the config."""
        for source in self._sources:
            for name in names:
                value = _read(source, name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def says(self, name: str) -> bool:
        """Whether the layer, or its config, has this switch on."""
        return any(_read(source, name) is True for source in self._sources)


def _read(source: Any, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except Exception:  # the config of a model whose layers differ has no number for all of them
        return None


Layout = Callable[[Widths, int], Cut | None]
"""From an attention layer's numbers and a weight's rows to how it is cut; None where they do not fit."""


def in_a_row(widths: Widths, rows: int, *, key_heads: int | None = None, turns: int = 0) -> Cut | None:
    """Queries, keys, values, one after the other; keys and values alone where rows hold no more."""
    heads, keys, size = widths.heads, key_heads or widths.key_heads, widths.head_size
    if not heads or not keys or not size:
        return None
    of_keys = keys * size
    if rows == heads * size + 2 * of_keys:
        return Cut(
            parts=("q", "k", "v"), rows=(rows - 2 * of_keys, of_keys, of_keys), heads=(heads, keys, keys), turns=turns
        )
    if rows == 2 * of_keys and not turns:
        return Cut(parts=("k", "v"), rows=(of_keys, of_keys), heads=(keys, keys))
    return None


def by_head(widths: Widths, rows: int) -> Cut | None:
    """Queries, keys and values of one head, then of the next."""
    return in_a_row(widths, rows, key_heads=widths.heads, turns=widths.heads or 0)


def _falcon(widths: Widths, rows: int) -> Cut | None:
    if widths.says("new_decoder_architecture"):
        keys = widths.first("num_kv_heads")
        return in_a_row(widths, rows, key_heads=keys, turns=keys or 0)
    return in_a_row(widths, rows, key_heads=1) if widths.says("multi_query") else by_head(widths, rows)


def _bigcode(widths: Widths, rows: int) -> Cut | None:
    return in_a_row(widths, rows, key_heads=1) if widths.says("multi_query") else by_head(widths, rows)


def _codegen(widths: Widths, rows: int) -> Cut | None:
    """Cut for four devices, queries, values, keys in each."""
    cut = in_a_row(widths, rows, turns=4)
    return None if cut is None or rows % 12 else replace(cut, parts=("q", "v", "k"))


def _thirds(widths: Widths, rows: int) -> Cut | None:
    """Queries, keys, values of one size, as torch and towers for vision have them."""
    heads = widths.heads or 1
    if rows % 3 or rows // 3 % heads:
        return None
    return Cut(parts=("q", "k", "v"), rows=(rows // 3,) * 3, heads=(heads,) * 3)


def _halves(widths: Widths, rows: int) -> Cut | None:
    return None if rows % 2 else Cut(parts=("gate", "up"), rows=(rows // 2,) * 2, heads=(1, 1))


def _delta(widths: Widths, rows: int, *, gated: bool) -> Cut | None:
    """Linear attention of Qwen3-Next: one key head with its values and gates, then the next; later ones in a row."""
    keys, values = widths.first("linear_num_key_heads"), widths.first("linear_num_value_heads")
    of_key, of_value = widths.first("linear_key_head_dim"), widths.first("linear_value_head_dim")
    if not keys or not values or not of_key or not of_value:
        return None
    parts, heads = ("q", "k", "v", "z"), (keys, keys, values, values)
    sizes = (keys * of_key, keys * of_key, values * of_value, values * of_value)
    count = 4 if gated else 3
    if sum(sizes[:count]) != rows or values % keys:
        return None
    return Cut(parts=parts[:count], rows=sizes[:count], heads=heads[:count], turns=keys if gated else 0)


def _delta_with_gates(widths: Widths, rows: int) -> Cut | None:
    return _delta(widths, rows, gated=True)


def _delta_in_a_row(widths: Widths, rows: int) -> Cut | None:
    return _delta(widths, rows, gated=False)


def _query_and_gate(widths: Widths, rows: int) -> Cut | None:
    """A head's queries, its output's gate, and so on with the next head."""
    heads, size = widths.heads, widths.head_size
    if not heads or not size or rows != 2 * heads * size:
        return None
    return Cut(parts=("q", "gate"), rows=(rows // 2,) * 2, heads=(heads, heads), turns=heads)


#: By the layer's name: how it is fused, and in which packages of ``transformers.models``.
_FUSED: dict[str, tuple[tuple[Layout, str], ...]] = {
    "c_attn": (
        (in_a_row, "gpt2 imagegpt decision_transformer openai clvp"),
        (_bigcode, "gpt_bigcode"),
    ),
    "query_key_value": (
        (by_head, "gpt_neox gpt_neox_japanese bloom persimmon"),
        (_falcon, "falcon"),
    ),
    "qkv_proj": (
        (in_a_row, "phi3 phi4_multimodal"),
        (by_head, "minimax"),
        (_codegen, "codegen"),
    ),
    "Wqkv": ((in_a_row, "mpt dbrx modernbert"),),
    "in_proj": ((by_head, "deberta"),),
    "att_proj": ((_thirds, "bark"),),
    "qkv_linear": ((_thirds, "layoutlmv2"),),
    "qkv": (
        (
            _thirds,
            "blip blip_2 instructblip instructblipvideo qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe"
            " qwen3_omni_moe glm4v glm4v_moe glm_image glm_ocr ernie4_5_vl_moe sam sam2 sam_hq vitdet mgp_str hiera"
            " timesformer florence2 got_ocr2 deepseek_ocr2 unlimited_ocr pp_formulanet seggpt slanext dots3_note"
            " glm5_next cohere_compass",
        ),
        (in_a_row, "exaone4_5"),
    ),
    "in_proj_qkvz": ((_delta_with_gates, "qwen3_next"),),
    "in_proj_qkv": ((_delta_in_a_row, "qwen3_5 qwen3_5_moe"),),
    "q_proj": ((_query_and_gate, "qwen3_next qwen3_5 qwen3_5_moe"),),
    "gate_up_proj": (
        (_halves, "phi3 phi4_multimodal glm glm4 glm4v glm_image glm_ocr dia zamba2 dots3_note minimax_m3_vl"),
    ),
    "Wi": ((_halves, "modernbert modernbert_decoder"),),
    "input_linear": ((_halves, "granitemoeshared granitemoehybrid"),),
}
#: Parameters of three dimensions that are no experts: by package, their names and options of their views.
_DEEP: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    # (width, heads, size of a head): one matrix, whose rows are the first dimension
    "xlnet": (("q", "k", "v", "o", "r"), {}),
    "funnel": (("r_kernel",), {}),
    "zamba": (("x_proj_weight", "dt_proj_weight"), {"batch_dims": 1}),
    # one matrix for each block of a diagonal, multiplied from the right
    "recurrent_gemma": (("input_gate_weight", "recurrent_gate_weight"), {"batch_dims": 1, "transpose": True}),
}
#: Layers whose names say that they are fused, whoever defines them.
LOOKS_FUSED = re.compile(r"(?i)c_attn|.*qkv.*|query_key_value|gate_up.*|w13|w1_?w3|in_proj_weight")


def family_of(module: nn.Module) -> str:
    """The package of ``transformers.models`` that defines a module or what it derives from; "" for other modules."""
    for cls in type(module).__mro__:
        found = re.match(r"transformers\.models\.(\w+)\.", cls.__module__)
        if found:
            return found.group(1)
    return ""


def fused(module: nn.Module, name: str, widths: Widths, rows: int) -> Cut | None:
    """How the layer ``name`` of ``module`` is fused; None where that is not known, or does not fit its rows."""
    if isinstance(module, nn.MultiheadAttention):
        return _thirds(widths, rows) if name == "in_proj_weight" else None
    family = family_of(module)
    for layout, families in _FUSED.get(name, ()):
        if family in families.split():
            return layout(widths, rows)
    return None


def deep(module: nn.Module, name: str) -> dict[str, Any] | None:
    """Options of the view of a module's own parameter of three dimensions; None where it is not known."""
    names, options = _DEEP.get(family_of(module), ((), {}))
    return options if name in names else None


# ------------------------------------------------------------------------------------------ not fused, but of heads

_QUERIES = re.compile(r"q_proj|query|q_lin|query_proj|q_attn|q|q_b_proj|wq")
_KEYS = re.compile(r"(k|v)_proj|key|value|(k|v)_lin|(key|value)_proj|k|v|wk|wv")


def heads_of(module: nn.Module, name: str, widths: Widths, rows: int) -> Cut | None:
    """How a layer that projects queries, keys or values falls into heads; None for other layers, and for sizes that
    do not fit."""
    if not is_projection(module, name):
        return None
    heads, latent = widths.heads, _latent(widths)
    if name == "kv_b_proj":
        if latent is None or not heads or rows != heads * (latent[0] + latent[2]):
            return None
        sizes = (heads * latent[0], heads * latent[2])
        return Cut(parts=("k", "v"), rows=sizes, heads=(heads, heads), turns=heads)
    queries = bool(_QUERIES.fullmatch(name))
    count = heads if queries else widths.key_heads
    size = latent[0] + latent[1] if latent is not None and queries else widths.head_size
    if not count or not size or rows != count * size:
        return None
    return Cut(parts=(name,), rows=(rows,), heads=(count,))


def is_projection(module: nn.Module, name: str) -> bool:
    """Whether a layer's name is one of an attention's queries, keys or values."""
    is_named = name == "kv_b_proj" or _QUERIES.fullmatch(name) or _KEYS.fullmatch(name)
    return bool(is_named) and "attention" in type(module).__name__.lower()


def _latent(widths: Widths) -> tuple[int, int, int] | None:
    """Multi-head latent attention: sizes of a head's key without and with position, and of its value."""
    found = [widths.first(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    return (found[0], found[1], found[2]) if all(found) else None  # type: ignore[return-value]


def layers_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """A module's linear layers: name, weight, and whether that is an addition of low rank (LoRA's B) to a layer."""
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield "in_proj_weight", module.in_proj_weight, False
    for name, child in module.named_children():
        base = getattr(child, "base_layer", child)
        weight = base._parameters.get("weight") if isinstance(base, nn.Module) else None
        if weight is not None:
            yield name, weight, False
        added = getattr(child, "lora_B", None)
        if isinstance(added, nn.ModuleDict):
            for adapter in added.values():
                yield name, adapter.weight, True  # type: ignore[misc]
