"""The model of a run: a preset or any causal language model that ``transformers`` can build from a config."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.job.presets import PRESETS
from ds_optim.machine.files import short
from ds_optim.zero.tensor import AUTOTP


def preset_config(name: str, vocab_size: int, seq_len: int) -> Any:
    """The ``Qwen3Config`` of a preset; raises ``UserError`` where the tokenizer has more tokens than it."""
    from transformers import Qwen3Config

    preset = PRESETS[name]
    _check_vocabulary(f"preset {name}", preset.vocab_size or vocab_size, vocab_size)
    return Qwen3Config(
        **preset.shape,
        vocab_size=preset.vocab_size or vocab_size,
        max_position_embeddings=max(seq_len, 1024),
        tie_word_embeddings=False,
        use_cache=False,
    )


def model_config(name: str, vocab_size: int) -> Any:
    """The config in a folder, in a ``config.json`` or of a model on the hub, with room for the tokenizer.

    Raises ``UserError`` where there is none, or where the tokenizer has more tokens than it.
    """
    from transformers import AutoConfig

    place = Path(name).expanduser()
    try:
        config = AutoConfig.from_pretrained(str(place) if place.exists() else name, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a wrong name or a broken file
        raise UserError(f"cannot load a model config from {name!r}: {reason_of(error)}") from None
    _check_vocabulary(f"model {name}", getattr(config, "vocab_size", vocab_size), vocab_size)
    config.use_cache = False
    return config


def build_model(config: Any, seed: int, *, zero_config: dict[str, Any] | None = None) -> torch.nn.Module:
    """A causal language model, its weights drawn in fp32 from ``seed`` alone: alike on all ranks and stages.

    With ``zero_config``, a DeepSpeed config of stage 3, the weights are partitioned while they are made
    (``deepspeed.zero.Init``): no rank ever holds more of them whole than one module's. Collective then.
    """
    with ExitStack() as stack:
        if zero_config is not None:
            import deepspeed
            from transformers.initialization import no_init_weights

            # What is partitioned is empty until it is gathered: the first draw comes below.
            stack.enter_context(no_init_weights())
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero_config))
        model = _causal_model(config)
    _draw_weights(model, seed, partitioned=zero_config is not None)
    return model


def _causal_model(config: Any) -> torch.nn.Module:
    """With fused attention where the class has it, else with its own."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"transformers has no causal language model for this config ({getattr(config, 'model_type', '')!r}): "
            "give one of a text decoder"
        )
    problem: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
            return model
        except ValueError as error:
            problem = error
    assert problem is not None
    raise UserError(f"transformers cannot build a causal language model of this config: {reason_of(problem)}")


def reason_of(error: Exception) -> str:
    """Why transformers took nothing from a folder or a name, in one line."""
    if "trust_remote_code" in str(error):
        return "it asks for code of its own (auto_map), which is never run; give one that transformers has by itself"
    return short(error, 200) or type(error).__name__


def _draw_weights(model: Any, seed: int, *, partitioned: bool) -> None:
    """Draw the weights again, module by module, by the model's own rule.

    ``from_config`` draws torch's default weights before the model's own, which ``zero.Init`` leaves out: only a
    draw of its own gives both ways of making a model the same weights.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        with ExitStack() as stack:
            if partitioned:
                import deepspeed

                # A module's rule may also write what its children hold.
                held = [*module.parameters(recurse=False)]
                held += [weight for child in module.children() for weight in child.parameters(recurse=False)]
                stack.enter_context(deepspeed.zero.GatheredParameters(held, modifier_rank=0))
            with torch.no_grad():
                model._init_weights(module)


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the model, each counted once; those that ZeRO or AutoTP has cut at their full size."""
    wholes = ((p, (getattr(p, AUTOTP, None) or {}).get("logical_shape")) for p in model.parameters())
    return sum(int(getattr(p, "ds_numel", p.numel())) if whole is None else math.prod(whole) for p, whole in wholes)


def next_token_losses(model: Any, windows: torch.Tensor, parts: int = 1, part: int = 0) -> torch.Tensor:
    """The loss of each target, in nats: windows (batch, seq_len + 1) -> (batch * seq_len,), in fp32.

    parts, part: of a sequence that so many ranks share, the part that this one computes; the losses are those of it.
    """
    x, y, places = windows[:, :-1], windows[:, 1:], {}
    if parts > 1:
        at = torch.arange(x.shape[1], dtype=torch.int64, device=x.device).expand_as(x)
        x, y, at = (tensor.chunk(parts, dim=1)[part] for tensor in (x, y, at))
        places = {"position_ids": at}
    logits = model(input_ids=x, use_cache=False, **places).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.reshape(-1), reduction="none")


def _check_vocabulary(what: str, model_size: int, tokenizer_size: int) -> None:
    if tokenizer_size > model_size:
        raise UserError(
            f"{what} has a vocabulary of {model_size}, the tokenizer one of {tokenizer_size};"
            f" use --tokenizer bpe:{model_size} or a smaller one"
        )
