"""The fused AdamW of torch and of DeepSpeed, each over one flat tensor: what our steps are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ds_optim.machine.extensions import load_op, use_own_folder


def torch_adamw(p: Tensor, g: Tensor, *, lr: float, decay: float) -> Callable[[], object]:
    """A step of torch's on weights ``p`` and gradient ``g``, (n,)."""
    return torch.optim.AdamW([_parameter(p, g)], lr=lr, weight_decay=decay, fused=True).step


def deepspeed_adamw(p: Tensor, g: Tensor, *, lr: float, decay: float) -> Callable[[], object]:
    """A step of DeepSpeed's for the device, where its C++ op is built; RuntimeError where it is not."""
    os.environ.setdefault("DS_ACCELERATOR", p.device.type)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    op = "cpu_adam" if p.device.type == "cpu" else "fused_adam"
    if not op_is_built(op):
        raise RuntimeError(f"DeepSpeed's op {op} is not built on this machine")
    load_op("CPUAdamBuilder" if p.device.type == "cpu" else "FusedAdamBuilder")
    kind = DeepSpeedCPUAdam if op == "cpu_adam" else FusedAdam
    step: Callable[[], object] = kind([_parameter(p, g)], lr=lr, weight_decay=decay).step
    return step


def op_is_built(name: str) -> bool:
    """Whether DeepSpeed's op was built, at installation or at an earlier use."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if installed_ops.get(name, False):
        return True
    use_own_folder()
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) / name if root else Path(_get_build_directory(name, False))
    return any(folder.glob(f"{name}*.so"))


def _parameter(p: Tensor, g: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(p)
    parameter.grad = g
    return parameter
