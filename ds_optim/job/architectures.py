"""The whole model that a ``transformers`` config describes, for its shapes alone."""

from __future__ import annotations

from typing import Any

import torch

from ds_optim.errors import UserError

TEXT_DECODER = "text decoder only"
#: What is asked for a model where a config names none; those of several parts first.
_AUTO = (
    *("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    *("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"),
)


def described_model(config: Any) -> tuple[torch.nn.Module, str]:
    """The model of a config on the meta device, and what it is: its class, and which part of the config where not all.

    The class is what ``architectures`` names, or else the largest that ``transformers`` has for the model type.

    Raises:
        UserError: there is no such class, or it does not take the config.
    """
    encodes = is_encoder_decoder(config)
    with torch.device("meta"):
        try:
            model = _named(config) or _of_type(config)
        except UserError:
            raise
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"transformers cannot build a model of this config: {reason}") from None
    part = f", {TEXT_DECODER}" if is_text_decoder(config, model, encodes) else ""
    return model, type(model).__name__ + part


def is_text_decoder(config: Any, model: Any, encodes: bool) -> bool:
    """Whether a model is but the text decoder of a config; ``encodes``: the config was of an encoder and a decoder."""
    return type(model.config) is not type(config) or (encodes and not is_encoder_decoder(model.config))


def is_encoder_decoder(config: Any) -> bool:
    """To be asked before a decoder is built, which may change it."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _named(config: Any) -> torch.nn.Module | None:
    """Of the class that the config names; None where it names none."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    if not names:
        return None
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise UserError(
            f'the config\'s "architectures" names {names[0]!r}, which transformers {transformers.__version__} has not: '
            "correct it or leave it out"
        )
    own = getattr(cls, "config_class", None)
    if own is not None and not isinstance(config, own) and isinstance(config.get_text_config(), own):
        config = config.get_text_config()
    return _built(cls._from_config, config)


def _of_type(config: Any) -> torch.nn.Module:
    import transformers

    for name in _AUTO:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return _built(auto.from_config, config)
    return _built(transformers.AutoModel.from_config, config)


def _built(build: Any, config: Any) -> torch.nn.Module:
    """In fp32, with the one way to compute attention that every class has: shapes do not depend on it."""
    model: torch.nn.Module = build(config, attn_implementation="eager", dtype=torch.float32)
    return model
