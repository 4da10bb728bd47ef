"""Reading a checkpoint's files without running what they may hold.

torch's restricted unpickler builds tensors and plain containers, and the classes named here; a file that asks for
anything else is refused before it is done.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.optimizers.layer_scales import LayerScales


@cache
def allowed_classes() -> tuple[Any, ...]:
    """The classes that DeepSpeed 0.19 pickles into its files, numpy's arrays, which client states hold, and the tuple
    that the first release of this package kept layer scales in."""
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # numpy pickles an array through a function of its own, which builds an empty one and fills it with bytes.
    rebuild = np.empty(0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in ("bool", "uint8", "uint32", "uint64", "int32", "int64", "f4", "f8")}
    classes = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, LayerScales, np.ndarray, np.dtype)
    return (*classes, rebuild, *sorted(dtypes, key=str))


def load(path: Path) -> Any:
    """What a file holds, its tensors on the CPU and not read before they are used.

    Raises:
        UserError: it is missing, damaged, or asks for a class that is not on the list.
    """
    try:
        with torch.serialization.safe_globals(list(allowed_classes())):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole") from None
    except pickle.UnpicklingError as problem:
        raise UserError(f"{path} is refused, and nothing in it was run: {_reason(problem)}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} cannot be read: {' '.join(str(problem).split())[:200]}") from None


@contextmanager
def laid_out(folder: Path) -> Iterator[None]:
    """Where a checkpoint's content is used: what is not as DeepSpeed lays it out is refused in one line.

    Raises:
        UserError: with what went wrong.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as problem:
        what = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        raise UserError(f"{folder} is not laid out as DeepSpeed 0.19 lays it out ({what})") from problem


def _reason(problem: Exception) -> str:
    """The sentence of torch's long message that names the class."""
    text = " ".join(str(problem).split())
    for sentence in text.split(". "):
        if "GLOBAL" in sentence or "Unsupported" in sentence:
            return sentence.removeprefix("WeightsUnpickler error: ")[:200]
    return text[:200]
