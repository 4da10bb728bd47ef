"""Reading a checkpoint's files without running what they may hold.

torch's restricted unpickler builds tensors and plain containers, and the classes named here; a file that asks for
anything else is refused before it is done.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable, open_regular, short
from ds_optim.optimizers.layer_scales import LayerScales

PICKLE_LIMIT = 64 << 20
"""Bytes of a file's ``data.pkl``, which names the tensors and holds everything else; a large model's is 20 MB."""
_LINE = 1000
_ZIP = b"PK\x03\x04"


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
    return (*classes, rebuild, *sorted(dtypes, key=str), (_stage_of, "builtins.getattr"))


def _stage_of(owner: Any, name: Any) -> Any:
    """In place of ``getattr``, by which early Python 3.11 (Debian 12's 3.11.2) pickles a member of an enumeration."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if owner is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"Unsupported global: getattr of {owner!r}.")
    stage: Any = ZeroStageEnum
    return stage[name]


def load(path: Path, *, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """What a file holds, its tensors on the CPU and, with ``mmap``, not read before they are used.

    Raises:
        UserError: it is missing, damaged, would unpack to more than it holds, or asks for a class that is not on the
            list.
    """
    try:
        zipped = _check_sizes(path)
        with torch.serialization.safe_globals(list(allowed_classes())):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and zipped)
    except Unreadable as reason:
        raise UserError(
            f"{path} {reason}: the checkpoint is not whole" if "missing" in str(reason) else f"{path} {reason}"
        ) from None
    except pickle.UnpicklingError as problem:
        raise UserError(f"{path} is refused, and nothing in it was run: {_reason(problem)}") from None
    except Exception as problem:  # what a damaged pickle raises is any of Python's
        raise UserError(f"{path} cannot be read: {short(problem, 200) or type(problem).__name__}") from None


def _check_sizes(path: Path) -> bool:
    """Whether it is an archive of torch's, whose parts are stored as they are, and not an older kind of file.

    Raises ``Unreadable`` for one that would unpack to more than torch writes.
    """
    with open_regular(path) as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
        size = file.seek(0, 2)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Unreadable("is refused: parts of it are compressed, which torch never does")
    if sum(entry.file_size for entry in entries) > size:
        raise Unreadable("is refused: it says that it unpacks to more than it holds")
    if any(entry.file_size > PICKLE_LIMIT for entry in entries if entry.filename.endswith("data.pkl")):
        raise Unreadable(f"is refused: its data.pkl is larger than {PICKLE_LIMIT:,} bytes")
    return True


@contextmanager
def laid_out(folder: Path) -> Iterator[None]:
    """Where a checkpoint's content is used: what is not as DeepSpeed lays it out is refused in one line.

    Raises:
        UserError: with what went wrong.
    """
    try:
        yield
    except UserError as problem:  # it may quote what the file holds, of whatever length
        raise UserError(short(problem, _LINE)) from None
    except (LookupError, ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as problem:
        what = f"{type(problem).__name__}: {short(problem, 200)}"
        raise UserError(f"{folder} is not laid out as DeepSpeed 0.19 lays it out ({what})") from problem


def _reason(problem: Exception) -> str:
    """The sentence of torch's long message that names the class."""
    text = " ".join(str(problem).split())
    for sentence in text.split(". "):
        if "GLOBAL" in sentence or "Unsupported" in sentence:
            return short(sentence.rpartition("WeightsUnpickler error: ")[2], 200)
    return short(text, 200)
