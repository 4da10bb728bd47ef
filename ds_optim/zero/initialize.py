"""``deepspeed.initialize`` for JSONs that name an optimizer of this package."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_optim.errors import UserError
from ds_optim.machine import rendezvous
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.zero.agree import agree_on_start, world
from ds_optim.zero.announce import announce_choice, announce_routes
from ds_optim.zero.auto import batch_sizes, fill_auto, hidden_size_of
from ds_optim.zero.complaints import as_user_errors
from ds_optim.zero.config import DEEPSPEED_PREFIX, Config, build_optimizer, is_ours, prepare_config, type_of
from ds_optim.zero.experts import BuiltLater, check_all_given, check_built_later, check_experts, replaces_experts
from ds_optim.zero.files import check_files_op
from ds_optim.zero.pipeline import check_pipeline, stages_of
from ds_optim.zero.reading import load_config
from ds_optim.zero.refused import SEQUENCE
from ds_optim.zero.schedulers import share_config
from ds_optim.zero.sequence import check_sequence, is_of_sequences
from ds_optim.zero.support import check_config, check_model, tensor_parallel_size
from ds_optim.zero.values import check_monitors, understood
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
    """``deepspeed.initialize``, where the JSON's ``optimizer.type`` may be one of ours.

    Bare names mean this package where it has them ("Lion", "Muon", "LionMuon", …), ``"deepspeed:Muon"``
    means DeepSpeed's, and any other type goes to DeepSpeed untouched; which it was is printed on rank 0. An "auto" in
    the config becomes what follows from the rest of it and from the model (``ds_optim.zero.auto``).

    Returns:
        (engine, optimizer, dataloader, lr_scheduler).

    Raises:
        UserError: a mistake in the config or the model, on every rank.
    """
    import deepspeed

    _init_distributed(deepspeed, dist_init_required, distributed_port)
    configs = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    loaded, built = _read(model, optimizer, model_parameters, configs, mpu, mesh_param)
    rendezvous.settle()  # the ranks have spoken to each other
    _announce(loaded, built, lr_scheduler)
    if isinstance(built, (ZeroOptimizer, BuiltLater)):
        prepare_config(loaded)
        model_parameters = None
    elif model_parameters is None and built is None:
        assert model is not None
        model_parameters = [p for p in model.parameters() if p.requires_grad]
    with as_user_errors():
        engine, *others = deepspeed.initialize(
            args=_without_config(args),
            model=model,
            optimizer=built,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=loaded,
            mesh_param=mesh_param,
        )
    built = built.optimizer if isinstance(built, BuiltLater) else built
    if isinstance(built, ZeroOptimizer):
        _check_stepped(engine.basic_optimizer, built)
    return engine, *others


def _check_stepped(stepped: Any, built: ZeroOptimizer) -> None:
    if stepped is not built:
        raise RuntimeError(
            f"DeepSpeed steps {type(stepped).__name__} instead of {type(built).__name__}: "
            "something between ds_optim and the engine replaced the optimizer"
        )


def _announce(loaded: Config, built: Any, lr_scheduler: Any) -> None:
    """Whose optimizer it is, its routes, and a rate of the config's schedule for each of our groups."""
    section = loaded.get("optimizer")
    if section is not None:
        name = type_of(section)
        section["type"] = name.removeprefix(DEEPSPEED_PREFIX)
        announce_choice(section["type"], ours=is_ours(name))
    if isinstance(built, ZeroOptimizer):
        announce_routes(built, peaks=None if lr_scheduler is not None else share_config(loaded, built))


def _read(
    model: nn.Module | None,
    optimizer: Any,
    parameters: Iterable[Any] | None,
    configs: Sequence[Any],
    mpu: Any,
    mesh: Any,
) -> tuple[Config, Any]:
    """The config as a dict of our own, and the optimizer; a mistake on one rank is raised on all.

    mpu, mesh: of the call, which bring tensor, or sequence parallelism along.
    """
    problem: UserError | None = None
    loaded: Config = {}
    built = optimizer
    try:
        check_versions()
        if model is None:
            raise UserError("ds_optim.initialize needs a model")
        loaded = load_config(_one(configs))
        ours = isinstance(optimizer, ZeroOptimizer) or _names_ours(loaded)
        sharing = 1
        if ours:
            check_pipeline(model, loaded, mpu)
            sharing = check_sequence(loaded, mpu, mesh)
            check_config(loaded)
            check_files_op(loaded)
        loaded = understood(loaded)
        fill_auto(loaded, hidden_size_of(getattr(model, "config", None)))
        comm = world()
        # Other parallelism has fewer data-parallel ranks, and DeepSpeed knows how many.
        if (is_of_sequences(mpu) or mpu is None) and (ours or not (mpu or mesh or SEQUENCE in loaded)):
            batch_sizes(loaded, comm.world_size // sharing // tensor_parallel_size(loaded) // stages_of(model))
        if comm.rank == 0:
            check_monitors(loaded)
        built = _choose_optimizer(model, optimizer, loaded, parameters)
    except UserError as error:
        problem = error
    # Before DeepSpeed's first collective: the other ranks would hang in it.
    agree_on_start(problem, model, loaded)
    return loaded, built


def _one(configs: Sequence[Any]) -> Any:
    if not configs:
        raise UserError("ds_optim.initialize needs a config: a dict or the path of a DeepSpeed JSON")
    if len(configs) > 1:
        raise UserError("the config is given twice: pass it as config=, or in args.deepspeed_config, not both")
    return configs[0]


def _names_ours(config: Config) -> bool:
    return config.get("optimizer") is not None and is_ours(type_of(config["optimizer"]))


def _choose_optimizer(model: nn.Module, optimizer: Any, config: Config, parameters: Iterable[Any] | None) -> Any:
    """The optimizer to hand to DeepSpeed: the caller's, one of ours by the config, or None for DeepSpeed's."""
    section = config.get("optimizer")
    if section is not None:
        name = type_of(section)
        if optimizer is not None:
            raise UserError(f"an optimizer is given in code and in the config ({name!r}): remove one of them")
        if not is_ours(name):
            return None
        chosen = _plain(parameters)
        built = build_optimizer(model, name, config, chosen)
        if not replaces_experts(config):
            return built
        check_all_given(model, chosen)
        return BuiltLater(partial(build_optimizer, model, name, dict(config)))
    if isinstance(optimizer, ZeroOptimizer):
        check_built_later(config)
        check_model(model)
        check_experts(model, config)
    return optimizer


def _without_config(args: Any) -> Any:
    """DeepSpeed refuses a config in both places, and the one in hand is the one that counts."""
    if getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None
    return args


def _init_distributed(deepspeed: Any, required: bool | None, port: int) -> None:
    accelerator = deepspeed.get_accelerator()
    if not dist.is_initialized():
        rendezvous.prepare()
        backend = accelerator.communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, distributed_port=port, dist_init_required=required)
    local_rank = os.environ.get("LOCAL_RANK", "")
    if local_rank.isdigit() and accelerator.device_name() != "cpu":
        # The engine does the same, later than the ranks' first word to each other.
        accelerator.set_device(int(local_rank))


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
