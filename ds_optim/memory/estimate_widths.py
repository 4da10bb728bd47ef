"""The widths of a language model that its activations follow from, as ``transformers`` configs write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

_GATE = re.compile(r"\.(gate_proj|gate_up_proj|gate_and_up_proj|w3|v1|wi_1)\b|(mlp|moe)\.input_linear\.")
_UP = re.compile(r"^(?!.*(vision|visual|audio)).*\.up_proj\.weight$")
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_EXPERTS = re.compile(r"\bexperts\.")


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The widths that activations follow from.

    intermediate: of all experts that a token meets. gated: the MLP has a gate beside its up projection. tied: the head
    is the embedding. fused: attention can leave its scores out. dropout: of scores, in training.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    tied: bool = False
    fused: bool = True
    dropout: bool = False


def transformer_of(config: Any, module: nn.Module) -> Transformer | None:
    """The widths in a ``transformers`` config, of its text decoder where it has several parts.

    Args:
        module: the model, whose names tell of gates and experts, and which may have no head over the vocabulary.

    Returns:
        None where the config is of no decoder with attention, or of an encoder beside it, whose activations and
        cross-attention no formula here counts.
    """
    names = [name for name, _ in module.named_parameters()]
    config = _text_config(config)
    layers, hidden = _first(config, "num_hidden_layers", "n_layer"), _first(config, "hidden_size", "n_embd")
    heads, vocabulary = _first(config, "num_attention_heads", "n_head"), _first(config, "vocab_size")
    if not (layers and hidden and heads and vocabulary) or getattr(config, "is_encoder_decoder", False):
        return None
    return Transformer(
        layers=layers,
        hidden=hidden,
        intermediate=_intermediate(config, module) or 4 * hidden,
        heads=heads,
        key_value_heads=_key_value_heads(config) or heads,
        head_dim=_head_dim(config) or hidden // heads,
        vocabulary=vocabulary if _puts_out_words(module) else 0,
        gated=any(map(_GATE.search, names)),
        tied=_tied(module),
        fused=getattr(module, "_supports_sdpa", True) is not False,
        dropout=any((getattr(config, name, 0) or 0) > 0 for name in _DROPOUT),
    )


def _puts_out_words(module: nn.Module) -> bool:
    return not hasattr(type(module), "get_output_embeddings") or module.get_output_embeddings() is not None  # type: ignore[operator]


def _tied(module: nn.Module) -> bool:
    if not _puts_out_words(module) or not hasattr(module, "get_input_embeddings"):
        return False
    head: Any = getattr(module, "get_output_embeddings", lambda: None)()
    embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def has_towers(config: Any) -> bool:
    """Whether a config is of more than its text decoder."""
    return config is not None and _text_config(config) is not config


def _text_config(config: Any) -> Any:
    """The config's part for text; None where there are several."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:
        return None


def _intermediate(config: Any, module: nn.Module) -> int:
    """By the weights where they are named alike in all families: RecurrentGemma halves what its config says."""
    named = list(module.named_parameters())
    dense = _first(config, "intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_inner")
    chosen = _first(config, "num_experts_per_tok", "experts_per_token")
    if not chosen or not any(_EXPERTS.search(name) for name, _ in named):
        return max((p.shape[0] for name, p in named if _UP.search(name)), default=dense)
    each = _first(config, "moe_intermediate_size") or dense
    shared = _first(config, "n_shared_experts") * each + _first(config, "shared_expert_intermediate_size")
    return chosen * each + shared


def _key_value_heads(config: Any) -> int:
    """Falcon's ``num_kv_heads`` counts in its new decoder alone; before that it had one, or as many as queries."""
    if _first(config, "num_key_value_heads"):
        return _first(config, "num_key_value_heads")
    if getattr(config, "new_decoder_architecture", False):
        return _first(config, "num_kv_heads")
    return 1 if getattr(config, "multi_query", False) else 0


def _head_dim(config: Any) -> int:
    """Under latent attention, the mean of what a query has and what a value has: ``head_dim`` is its rotated part."""
    query, value = _first(config, "qk_head_dim"), _first(config, "v_head_dim")
    return (query + value) // 2 if query and value else _first(config, "head_dim")


def _first(config: Any, *names: str) -> int:
    """The first of the attributes that is set, its largest where it has one a layer; 0 without any."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers refuses an attribute of its own for each layer
            value = max(getattr(layer, name, 0) or 0 for layer in config.per_layer_config)
        if isinstance(value, (list, tuple)):
            value = max(value, default=0)
        if value:
            return int(value)
    return 0
