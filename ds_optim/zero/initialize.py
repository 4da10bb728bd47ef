"""``deepspeed.initialize`` for JSONs that name an optimizer of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.sharding.binding import full_shape
from ds_optim.zero.config import (
    DEEPSPEED_PREFIX,
    Config,
    build_optimizer,
    canonical_type,
    check_type,
    is_ours,
    load_config,
    prepare_config,
)
from ds_optim.zero.support import check_config, check_model
from ds_optim.zero.versions import check_versions


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Build a DeepSpeed engine; the JSON's ``optimizer.type`` may be one of ours.

    Bare names mean this package where it has them ("Lion", "Muon", "LionMuon", …), ``"deepspeed:Muon"``
    means DeepSpeed's, and any other type goes to DeepSpeed untouched; which it was is printed on rank 0.

    Args: as ``deepspeed.initialize``.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler), as ``deepspeed.initialize``.

    Raises:
        UserError: a mistake in the config or the model, on every rank.
    """
    import deepspeed

    check_versions()
    if model is None:
        raise UserError("ds_optim.initialize needs a model")
    given = config if config is not None else config_params
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is None:
        raise UserError("ds_optim.initialize needs a config: a dict or the path of a DeepSpeed JSON")
    loaded = load_config(given)
    section = loaded.get("optimizer")
    built = optimizer
    parameters = model_parameters
    if section is not None:
        name = _type_of(section)
        if optimizer is not None:
            raise UserError(f"an optimizer is given in code and in the config ({name!r}): remove one of them")
        if is_ours(name):
            _init_distributed(deepspeed, dist_init_required, distributed_port)
            built = _build_everywhere(model, loaded, name, model_parameters, mpu, mesh_param)
            del loaded["optimizer"]
            prepare_config(loaded)
            parameters = None
        else:
            section["type"] = name.removeprefix(DEEPSPEED_PREFIX)
        _announce(name, ours=is_ours(name))
    elif isinstance(optimizer, ZeroOptimizer):
        check_config(loaded)
        prepare_config(loaded)
    if parameters is None and built is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    engine, wrapped, loader, scheduler = deepspeed.initialize(
        args=_without_config(args),
        model=model,
        optimizer=built,
        model_parameters=parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=loaded,
        mesh_param=mesh_param,
    )
    if isinstance(built, ZeroOptimizer) and engine.basic_optimizer is not built:
        raise RuntimeError(
            f"DeepSpeed steps {type(engine.basic_optimizer).__name__} instead of {type(built).__name__}: "
            "something between ds_optim and the engine replaced the optimizer"
        )
    return engine, wrapped, loader, scheduler


def _type_of(section: Any) -> str:
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise UserError('"optimizer" names no type: write {"type": "LionMuon", "params": {…}}')
    check_type(section["type"])
    return canonical_type(section["type"])


def _without_config(args: Any) -> Any:
    """DeepSpeed refuses a config in both places, and the one in hand is the one that counts."""
    if getattr(args, "deepspeed_config", None) is not None:
        args.deepspeed_config = None
    return args


def _init_distributed(deepspeed: Any, required: bool | None, port: int) -> None:
    if not dist.is_initialized():
        backend = deepspeed.get_accelerator().communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, distributed_port=port, dist_init_required=required)


def _build_everywhere(
    model: nn.Module, config: Config, name: str, parameters: Iterable[Any] | None, mpu: Any, mesh_param: Any
) -> ZeroOptimizer:
    """Build the optimizer and let the ranks agree that they did, before DeepSpeed's first collective.

    A mistake on one rank is raised on all; a rank that died silently would leave the others hanging.
    """
    problem: str | None = None
    built: ZeroOptimizer | None = None
    try:
        if mpu is not None or mesh_param is not None:
            raise UserError("model and sequence parallelism are not supported: pass neither mpu nor mesh_param")
        check_config(config)
        check_model(model)
        built = build_optimizer(model, name, config["optimizer"].get("params", {}), _plain(parameters))
    except UserError as error:
        problem = str(error)
    _agree(problem, model, config)
    assert built is not None
    return built


def _plain(parameters: Iterable[Any] | None) -> list[nn.Parameter] | None:
    if parameters is None:
        return None
    listed = [p[1] if isinstance(p, tuple) else p for p in parameters]
    if any(isinstance(p, dict) for p in listed):
        raise UserError(
            "model_parameters holds parameter groups, and the config's optimizer makes its own: pass parameters, "
            "or build the optimizer in code from ds_optim.param_groups(model)"
        )
    return listed


def _agree(problem: str | None, model: nn.Module, config: Config) -> None:
    described = [(n, full_shape(p), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    digest = hashlib.sha256(repr((described, sorted(config.items(), key=str))).encode()).hexdigest()
    everywhere: list[Any] = [(problem, digest)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (problem, digest))
    for found, _ in everywhere:
        if found is not None:
            raise UserError(found)
    different = [rank for rank, (_, other) in enumerate(everywhere) if other != everywhere[0][1]]
    if different:
        raise UserError(
            f"rank {different[0]} has another model or config than rank 0: build the same parameters, in the same "
            "order, and read the same config on every rank"
        )


def _announce(name: str, *, ours: bool) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        whose = "ds_optim" if ours else "DeepSpeed or torch"
        print(f"ds_optim: optimizer {name.removeprefix(DEEPSPEED_PREFIX)!r} of {whose}", flush=True)
