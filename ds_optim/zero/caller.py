"""Who calls an optimizer: the DeepSpeed objects that hold it, found on the call stack.

A client optimizer is handed no engine and no config. The wrapper that steps it, and the engine that steps
the wrapper, are what knows whether the settings are ones that this package supports, and whether the call
belongs to set-up. The first that is heard of an engine is the end of its constructor, where it reads the rates of
the groups to print them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers.routing import in_stages
from ds_optim.sharding.comm import Comm

_DEPTH = 24  # hooks of torch and of schedulers stand between the engine, the wrapper and the optimizer


@dataclass(frozen=True)
class Caller:
    """The object whose ``optimizer`` is being stepped or read, and the name of its method that does so.

    ``engine`` is the DeepSpeed engine above it (the object itself where no wrapper stands between); None
    while its wrapper or scheduler is set up, or where the user's code steps the wrapper. ``building``: the engine's
    own constructor is what runs.
    """

    wrapper: Any
    method: str
    engine: Any = None
    building: bool = False


def find_caller(optimizer: object) -> Caller | None:
    """The nearest holders of ``optimizer`` on the stack; None where the user's own code steps it."""
    held: object = optimizer
    wrapper, method = None, ""
    own = inspect.currentframe()
    # Not from here: a frame whose locals were asked for keeps them, itself among them, and so the optimizer.
    frame = own.f_back if own is not None else None
    del own
    for _ in range(_DEPTH):
        if frame is None:
            break
        owner = _owner(frame)
        if owner is not None and owner is not held and owner is not optimizer and _holds(owner, held):
            if wrapper is None:
                wrapper, method = owner, frame.f_code.co_name
            if _is_engine(owner):
                return Caller(wrapper, method, owner, building=_constructs(frame, owner))
            held = owner
        frame = frame.f_back
    return None if wrapper is None else Caller(wrapper, method)


def _constructs(frame: FrameType | None, owner: object) -> bool:
    """Whether the constructor of ``owner`` is among the callers of ``frame``."""
    for _ in range(_DEPTH):
        if frame is None:
            break
        if frame.f_code.co_name == "__init__" and _owner(frame) is owner:
            return True
        frame = frame.f_back
    return False


def _owner(frame: FrameType) -> object:
    """The object whose method runs in a frame.

    Only methods are asked: a frame keeps what its locals were when somebody looked, and a user's function would keep
    an optimizer that it has let go of.
    """
    code = frame.f_code
    return frame.f_locals.get("self") if code.co_argcount and code.co_varnames[0] == "self" else None


def _holds(owner: object, held: object) -> bool:
    try:
        return getattr(owner, "optimizer", None) is held
    except Exception:  # somebody's property that is not ready: whoever it is, it does not hold us
        return False


def _is_engine(owner: object) -> bool:
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(owner).__mro__)


def tensor_ranks(engine: Any) -> Comm | None:
    """The tensor-parallel group of an engine; None without one, or where it is of one rank.

    Raises:
        UserError: its ``mpu`` has pipeline parallelism too.
    """
    mpu = getattr(engine, "mpu", None)
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel") or in_stages(getattr(engine, "module", None)):
        return None
    from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_group

    if bwc_pipeline_parallel_world_size(mpu) > 1:
        raise UserError("the mpu has pipeline parallelism, which is not supported: use tensor parallelism alone")
    comm = Comm.of_group(bwc_tensor_model_parallel_group(mpu))
    return comm if comm.world_size > 1 else None
