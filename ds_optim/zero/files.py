"""What is asked of a config that keeps optimizer state, and weights with it, in files: offload to NVMe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_optim.errors import UserError
from ds_optim.zero.auto import at
from ds_optim.zero.refused import BF16, OFFLOAD, WEIGHTS, ZERO, as_number, is_nvme, is_true


def check_files(config: Mapping[str, Any]) -> None:
    """Refuse what is missing, or beside it cannot be, where optimizer state is offloaded to files.

    Raises:
        UserError: with what to write instead.
    """
    if not is_nvme(at(config, f"{OFFLOAD}.device")):
        return
    if not at(config, f"{OFFLOAD}.nvme_path"):
        raise UserError(f"{OFFLOAD}.device is 'nvme': write {OFFLOAD}.nvme_path, a folder on a local disk")
    if is_true(at(config, "checkpoint.load_universal")):
        raise UserError(
            f'checkpoint.load_universal is not supported with {OFFLOAD}.device "nvme": DeepSpeed 0.19 reads no '
            'optimizer state then; set it to false, or the device to "cpu"'
        )
    if is_nvme(at(config, f"{WEIGHTS}.device")):
        _check_weights(config)


def _check_weights(config: Mapping[str, Any]) -> None:
    if not at(config, f"{WEIGHTS}.nvme_path"):
        raise UserError(f"{WEIGHTS}.device is 'nvme': write {WEIGHTS}.nvme_path, a folder on a local disk")
    if not any(is_true(at(config, f"{section}.enabled")) for section in BF16):
        raise UserError(
            f'{WEIGHTS}.device "nvme" is supported with weights in bf16 alone: DeepSpeed 0.19 reads fp32 ones into '
            'buffers of bf16, and fails; set bf16.enabled to true, or the device to "cpu"'
        )
    if as_number(at(config, f"{ZERO}.stage3_prefetch_bucket_size")) != 0:
        raise UserError(
            f'{WEIGHTS}.device "nvme" is supported without prefetching: DeepSpeed 0.19 fails where the weights that it '
            f"reads ahead have one of them twice, as about the last layer; set {ZERO}.stage3_prefetch_bucket_size to 0"
        )


def check_files_op(config: Mapping[str, Any]) -> None:
    """Refuse state in files where DeepSpeed's op for them does not build, which it says in many lines later.

    Raises:
        UserError: with what to install.
    """
    if not is_nvme(at(config, f"{OFFLOAD}.device")):
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("async_io"):  # built when DeepSpeed was
        return
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise UserError(
            f'{OFFLOAD}.device is "nvme", and DeepSpeed\'s async_io does not build here: install libaio with its '
            'headers (libaio-dev, libaio-devel), or use "cpu"'
        )
