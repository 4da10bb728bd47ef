"""A model's names and shapes without the model: enough to route its parameters anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers.kinds import NO_VIEW, STACK
from ds_optim.sharding.binding import Member
from ds_optim.zero.checkpoints.module import Module
from ds_optim.zero.checkpoints.portable import Portable


def skeleton(portable: Portable) -> nn.Module:
    """Modules that hold empty parameters of the checkpoint's names and shapes, in its order, tied ones twice.

    What kind of layer a parameter is of cannot be known here: embeddings and heads are found by their names
    alone.
    """
    module = Module(portable)
    shapes = {spec.name: spec.shape for spec in portable.specs}
    parameters = {
        name: nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")) for name, shape in shapes.items()
    }
    for name, shape in module.frozen_shapes.items():
        if name not in shapes:
            parameters[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)
    root = nn.Module()
    for name in module.names:
        held = parameters.get(module.shared.get(name, name))
        if held is not None:
            *path, last = name.split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(last, held)
    return root


def check_routable(members: Iterable[Member]) -> None:
    """Refuse parameters of three dimensions and more that only a view says more of: a convolution is a matrix, a stack
    is not.

    Raises:
        UserError: naming the first of them.
    """
    for member in members:
        name, shape = member.spec.name, member.spec.shape
        if member.reason in (STACK, NO_VIEW):
            raise UserError(
                f"{name} has the shape {shape}, and without the model nobody knows whether it is a convolution or a "
                'stack of matrices: add {"match": "..."} to "views" in --optimizer-params (with batch_dims for a '
                'stack), or its pattern to "matrix_exclude"'
            )
