"""What a run reads besides its settings, as digests: text, tokenizer, the model's config, what ``auto`` chose.

The ranks compare what they have read before the first step (data.py, setup.py). A checkpoint notes the digests, and a
run that goes on from it with others is refused: its losses would be other ones without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ds_optim.data.load import TextData
from ds_optim.errors import UserError
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.rules import RULES
from ds_optim.survival.identity import DIGESTS
from ds_optim.survival.resume import Checkpoint

_SAYS = {
    "text": "the text of --data",
    "model": "the config of --model",
    "tokenizer": "the tokenizer",
    "polar": 'how matrices are orthogonalized (what "auto" in polar chose here)',
}
# Of a model's config, what says where it came from, and not what it is.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_DIGITS = 16

Inputs = dict[str, str]


def read_inputs(data: TextData, engine: Any) -> Inputs:
    """The digests of a run, by the names that ``--accept`` takes. Collective."""
    return {
        "text": data.text_digest,
        "model": model_digest(engine.module.config),
        "tokenizer": data.tokenizer_digest,
        # Rank 0 chooses for all, on whatever hardware they run.
        "polar": ranks.from_first(lambda: polar_digest(engine.basic_optimizer)),
    }


def check_inputs(settings: TrainSettings, inputs: Inputs, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is to be said of the inputs of a run that goes on from a checkpoint, a line each.

    Raises ``UserError`` where one is another than the checkpoint's and is not accepted.
    """
    noted = checkpoint.notes.get(DIGESTS)
    if not isinstance(noted, Mapping):
        return ("the checkpoint does not say what text, model and tokenizer it was trained with: not compared",)
    left = ("polar",) if settings.reset_optimizer else ()
    changed = [name for name, now in inputs.items() if name not in left and name in noted and noted[name] != now]
    refused = [name for name in changed if name not in settings.accept]
    if refused:
        raise UserError(
            f"--resume: {' and '.join(_SAYS[name] for name in refused)} changed since {checkpoint.folder} was saved;"
            f" give the same again, or --accept {','.join(changed)} to go on with what is there now"
        )
    return tuple(f"accepted: {_SAYS[name]} changed since the checkpoint was saved" for name in changed)


def model_digest(config: Any) -> str:
    """A digest of a ``transformers`` config: of all that decides what the model computes."""
    said = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
    return digest(json.dumps(said, sort_keys=True, default=str))


def polar_digest(optimizer: Any) -> str:
    """A digest of how an optimizer's matrices are orthogonalized on this machine, every ``auto`` decided."""
    if not isinstance(optimizer, ZeroOptimizer):
        return digest("none")
    chosen = [
        asdict(optimizer.polar.resolve(ranks.device(), members[0].parameter.dtype))
        for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
        if RULES[group["rule"]].shape is not None and members
    ]
    return digest(json.dumps(chosen, sort_keys=True))


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
