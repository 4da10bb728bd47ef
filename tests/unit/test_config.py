"""DeepSpeed configs: what is read, what is refused, and what the line says."""

from __future__ import annotations

import copy
import json
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.zero.config import canonical_type
from ds_optim.zero.files import check_files_op
from ds_optim.zero.refused import REFUSED_ATTRIBUTES, REFUSED_SETTINGS
from ds_optim.zero.support import check_config, check_engine, check_model, check_parameters, check_wrapper

LION_MUON = {"type": "LionMuon", "params": {"lr": 1e-3}}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)


def config(**settings: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "optimizer": copy.deepcopy(LION_MUON), **settings}


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: dict[str, Any] = value
    return result


# Values to refuse and values to take, as a JSON and transformers write them: strings and "auto" too.
VALUES: Mapping[str, tuple[list[Any], list[Any]]] = {
    "zero_optimization.compute_grad_norm": ([False, "false", 0], [True, "auto"]),
    "bf16.check_grad_overflow": ([False, "False"], [True, "auto"]),
    "bfloat16.check_grad_overflow": ([False], [True]),
    "zero_optimization.offload_optimizer.device": (["nvme"], ["cpu", "none"]),
    "zero_optimization.offload_param.device": (["nvme"], ["cpu", "none"]),
    "zero_optimization.offload_optimizer.ratio": ([0.5, "0.5", 0], [1.0, 1, "auto"]),
    "zero_optimization.offload_optimizer.super_offload": ([True], [False]),
    "zero_optimization.zenflow": ([{"topk_ratio": 0.1}], [None, "auto"]),
    "zero_optimization.zero_quantized_nontrainable_weights": ([True], [False]),
    "zero_optimization.elastic_checkpoint": ([True], [False]),
    "fp16.fp16_master_weights_and_grads": ([True], [False]),
    "bf16.bf16_master_weights_and_grads": ([True], [False]),
    "bfloat16.bf16_master_weights_and_grads": ([True], [False]),
    "bf16.bf16_optimizer_states": ([True], [False]),
    "bfloat16.bf16_optimizer_states": ([True], [False]),
    "fp8.enabled": ([True], [False]),
    "compile.deepcompile": ([True, "true"], [False]),
    "tensor_parallel.tp.tp_size": ([2], [1]),
    "tensor_parallel.tensor_parallel.tp_size": ([2], [1]),
    "hybrid_engine.enabled": ([True], [False]),
    "data_efficiency.data_routing.random_ltd.enabled": ([True], [False]),
    "pipeline.stages": ([2], ["auto", 1]),
}


def test_every_refused_setting_has_values_here() -> None:
    assert [path for path, *_ in REFUSED_SETTINGS] == list(VALUES)


@pytest.mark.parametrize("path", VALUES)
def test_a_setting_is_refused_with_one_line_that_says_what_to_write(path: str) -> None:
    refused, taken = VALUES[path]
    for value in refused:
        given = {**config(), **nested(path, value)}
        with pytest.raises(UserError) as caught:
            ds_optim.from_config(Small(), given)
        line = str(caught.value)
        assert line.startswith(f"{path} = {value!r} is not supported")
        assert re.search(r"(set it to|leave (it|elasticity) (out|true)|leave it|use) ?", line.split(": ", 1)[1])
        assert "\n" not in line
    for value in taken:
        given = nested(path, value)
        check_config({**given, "zero_optimization": {"stage": 1, **given.get("zero_optimization", {})}})


def test_paths_are_those_that_deepspeed_reads() -> None:
    """A misspelt path would refuse nothing: each of them is a field of DeepSpeed's own models."""
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        _REMOVED_ZERO_CONFIG_KEYS,
        EXPERT_PARALLEL,
        HybridEngineConfig,
        get_pipeline_config,
        get_torch_autocast_enabled,
    )
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    assert get_torch_autocast_enabled({"torch_autocast": {"enabled": True}})
    assert get_pipeline_config({"pipeline": {"stages": 3}})["stages"] == 3
    assert EXPERT_PARALLEL == "expert_parallel"
    models: dict[str, Any] = {
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "compile": CompileConfig,
        "tensor_parallel.tp": TPConfig,
        "tensor_parallel.tensor_parallel": TPConfig,
        "tensor_parallel": TPTrainingConfig,
        "hybrid_engine": HybridEngineConfig,
    }
    # Read by name in DeepSpeed, or refused by it too (fp8 has no key there at all: a guard for later ones).
    elsewhere = {"torch_autocast", "pipeline", "expert_parallel", "data_efficiency", "fp8"}
    for path, *_ in REFUSED_SETTINGS:
        section, _, key = path.rpartition(".")
        if path.split(".")[0] in elsewhere or path.split(".")[0] in _REMOVED_TOP_LEVEL_CONFIG_KEYS:
            continue
        known = set(models[section].model_fields) | (_REMOVED_ZERO_CONFIG_KEYS.keys() if "zero" in section else set())
        assert key in known, f"DeepSpeed has no {path}"


def test_data_efficiency_and_sequence_paths_are_those_that_deepspeed_reads() -> None:
    import inspect

    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime.data_pipeline.config import get_data_efficiency_config

    read = get_data_efficiency_config({"data_efficiency": {"data_routing": {"random_ltd": {"enabled": False}}}})
    assert "enabled" in read["data_routing"]["random_ltd"]
    assert '"sequence_parallel_size"' in inspect.getsource(deepspeed_config)


@pytest.mark.parametrize("stage", [4, -1, "two", 1.5])
def test_a_wrong_stage_is_refused(stage: Any) -> None:
    with pytest.raises(UserError, match=r"zero_optimization\.stage is .*: write 0, 1, 2 or 3"):
        ds_optim.from_config(Small(), config(zero_optimization={"stage": stage}))


def test_the_old_bool_for_zero_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape('write {"stage": 1}')):
        ds_optim.from_config(Small(), config(zero_optimization=True))


@pytest.mark.parametrize("stage", [0, "0", None])
@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer is for"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "fp32 is for ZeRO stages 1 to 3 wh"),
    ],
)
def test_what_is_for_shards_is_refused_at_stage_0(stage: Any, more: dict[str, Any], line: str) -> None:
    zero = more.get("zero_optimization", {})
    given = {**more, "zero_optimization": {**zero, **({} if stage is None else {"stage": stage})}}
    with pytest.raises(UserError, match=f"{line}.*set zero_optimization.stage"):
        ds_optim.from_config(Small(), config(**given))
    check_config({**given, "zero_optimization": {**zero, "stage": 2}})
    check_config({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}})
    check_config({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}})


def test_fp16_at_stage_0_is_refused_with_a_loss_scale() -> None:
    with pytest.raises(UserError, match="fp16 at ZeRO stage 0"):
        ds_optim.from_config(Small(), config(fp16={"enabled": True}))
    ds_optim.from_config(Small(), config(fp16={"enabled": True, "loss_scale": 1}))
    ds_optim.from_config(Small(), config(fp16={"enabled": True}, zero_optimization={"stage": 1}))


@pytest.mark.parametrize("value", [0, -2, 1.5, "two", True])
def test_sequences_are_shared_among_a_whole_number_of_ranks(value: Any) -> None:
    with pytest.raises(UserError, match=r"sequence_parallel_size is .*: write a whole number of ranks"):
        ds_optim.from_config(Small(), config(sequence_parallel_size=value))
    for taken in (1, 2, "2", None, "auto"):
        check_config({"sequence_parallel_size": taken})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float16", "fp16", "torch.float16", "half"])
def test_autocast_in_fp16_is_refused_where_deepspeed_scales_by_itself(stage: int, dtype: str) -> None:
    given = {"torch_autocast": {"enabled": True, "dtype": dtype}}
    with pytest.raises(UserError, match=r"torch_autocast\.dtype = .*stages 1 to 3.*\"bfloat16\""):
        ds_optim.from_config(Small(), config(**given, zero_optimization={"stage": stage}))
    check_config({**given, "zero_optimization": {"stage": 0}})
    check_config({"torch_autocast": {"enabled": False, "dtype": dtype}, "zero_optimization": {"stage": stage}})
    check_config({"torch_autocast": {"enabled": True, "dtype": "bf16"}, "zero_optimization": {"stage": stage}})


def test_autocast_asks_for_a_dtype_that_deepspeed_knows() -> None:
    with pytest.raises(UserError, match=r"without a dtype.*bfloat16"):
        ds_optim.from_config(Small(), config(torch_autocast={"enabled": True}))
    with pytest.raises(UserError, match=r"torch_autocast\.dtype is 'fp17': write"):
        ds_optim.from_config(Small(), config(torch_autocast={"enabled": True, "dtype": "fp17"}))


def test_secondary_shards_are_refused_under_tensor_parallelism() -> None:
    given = {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    beside = "zero_hpz_partition_size is not supported beside tensor_parallel.autotp_size"
    with pytest.raises(UserError, match=rf"{re.escape(beside)}.*set it to 1"):
        check_config(given)
    check_config({**given, "tensor_parallel": {"autotp_size": 1}})
    with pytest.raises(UserError, match="zero_hpz_partition_size is not supported under tensor parallelism"):
        check_wrapper(types.SimpleNamespace(zero_hpz_partition_size=2, model_parallel_group=object()))
    check_wrapper(types.SimpleNamespace(zero_hpz_partition_size=2, model_parallel_group=None))


def test_quantized_gradients_are_refused_under_tensor_parallelism() -> None:
    zero = {"stage": 3, "zero_quantized_gradients": True}
    with pytest.raises(
        UserError, match=r"zero_quantized_gradients is not supported beside tensor_parallel\.autotp_size"
    ):
        check_config({"tensor_parallel": {"autotp_size": 2}, "zero_optimization": zero})
    check_config({"zero_optimization": zero})
    with pytest.raises(UserError, match="zero_quantized_gradients is not supported under tensor parallelism"):
        check_wrapper(types.SimpleNamespace(all2all_process_group={}, model_parallel_group=object()))


def test_state_in_files_asks_for_libaio_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    there = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}
    given = config(train_micro_batch_size_per_gpu=1, zero_optimization=there)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match="async_io does not build here: install libaio"):
        check_files_op(given)
    check_files_op({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    check_files_op(given)


def test_state_in_files_is_for_stage_3_with_a_folder() -> None:
    there = {"device": "nvme", "nvme_path": "/local"}

    def given(stage: int, **beside: Any) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage, "offload_optimizer": there}, **beside}

    check_config(given(3))
    for stage in (0, 1, 2):
        with pytest.raises(UserError, match=r"at stage 3 alone.*stage to 3"):
            check_config(given(stage))
    with pytest.raises(UserError, match="load_universal is not supported with"):
        check_config(given(3, checkpoint={"load_universal": True}))
    with pytest.raises(UserError, match=r"expert_parallel\.enabled is not supported beside.*use \"cpu\""):
        check_config(given(3, expert_parallel={"enabled": True}))
    del there["nvme_path"]
    with pytest.raises(UserError, match=r"write zero_optimization\.offload_optimizer\.nvme_path"):
        check_config(given(3))


def test_weights_in_files_are_bf16_ones_whose_state_is_there_too() -> None:
    there = {"device": "nvme", "nvme_path": "/local"}

    def given(state: Mapping[str, str], weights: Mapping[str, str], **beside: Any) -> dict[str, Any]:
        zero = {"stage": 3, "offload_optimizer": dict(state), "offload_param": dict(weights)}
        zero |= {"stage3_prefetch_bucket_size": beside.pop("prefetch", 0)}
        return {"zero_optimization": zero, "bf16": {"enabled": True}, **beside}

    check_config(given(there, there))
    for state in ({"device": "cpu"}, {}):
        with pytest.raises(UserError, match=r"offload_param\.device.*loads no checkpoint.*\"nvme\" too"):
            check_config(given(state, there))
    with pytest.raises(UserError, match=r"write zero_optimization\.offload_param\.nvme_path"):
        check_config(given(there, {"device": "nvme"}))
    with pytest.raises(UserError, match=r"weights in bf16 alone.*set bf16\.enabled to true"):
        check_config(given(there, there, bf16={"enabled": False}))
    for prefetch in (50_000_000, "auto", None):
        with pytest.raises(UserError, match="stage3_prefetch_bucket_size to 0"):
            check_config(given(there, there, prefetch=prefetch))


ATTRIBUTES: Mapping[str, tuple[Any, Any]] = {
    "compute_grad_norm": (False, True),
    "zenflow": (True, False),
    "partial_offload": (0.5, 1.0),
    "zero_quantized_nontrainable_weights": (True, False),
    "torch_autocast_gradscaler": (object(), None),
    "low_precision_master_weights_and_grads": (True, False),
    "elastic_checkpoint": (True, False),
}


def test_a_wrapper_with_a_refused_attribute_is_refused() -> None:
    assert [name for name, *_ in REFUSED_ATTRIBUTES] == list(ATTRIBUTES)
    check_wrapper(types.SimpleNamespace(**{name: taken for name, (_, taken) in ATTRIBUTES.items()}))
    for name, (refused, _) in ATTRIBUTES.items():
        with pytest.raises(UserError, match=name):
            check_wrapper(types.SimpleNamespace(**{name: refused}))
    check_wrapper(types.SimpleNamespace(check_grad_overflow=False, dtype=torch.float32))
    check_wrapper(types.SimpleNamespace(params_in_nvme_and_cpu=True, swap_optimizer=True))
    with pytest.raises(UserError, match=r"params_in_nvme_and_cpu.*loads no checkpoint"):
        check_wrapper(types.SimpleNamespace(params_in_nvme_and_cpu=True, swap_optimizer=False))
    with pytest.raises(UserError, match="check_grad_overflow"):
        check_wrapper(types.SimpleNamespace(check_grad_overflow=False, dtype=torch.bfloat16))


def test_the_attributes_are_those_of_deepspeeds_wrappers() -> None:
    import inspect

    from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
    from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    source = inspect.getsource(stage3) + inspect.getsource(stage_1_and_2)
    for name, *_ in REFUSED_ATTRIBUTES:
        assert f"self.{name}" in source, f"no wrapper of DeepSpeed has {name}"
    for cls in (SuperOffloadOptimizer_Stage3, ZenFlowZeroOptimizer):
        with pytest.raises(UserError, match=cls.__name__):
            check_wrapper(cls.__new__(cls))


# ------------------------------------------------------------------------------------------------ the optimizer


BAD_SECTIONS: list[tuple[Any, str]] = [
    ({"type": "LionMoun"}, "unknown optimizer type 'LionMoun' (did you mean 'LionMuon'?)"),
    ({"type": "adamwx"}, "unknown optimizer type 'adamwx' (did you mean 'adamw'?)"),
    ({"type": "deepspeed:Muom"}, "DeepSpeed has no optimizer 'Muom' (did you mean 'muon'?)"),
    ({"type": "Optimizer2"}, "unknown optimizer type 'Optimizer2'"),
    ({"params": {}}, 'write "optimizer": {"type": "LionMuon"'),
    ("LionMuon", 'write "optimizer": {"type": "LionMuon"'),
    ({"type": "LionMuon", "param": {"lr": 1}}, "\"optimizer\" has no parameter 'param' (did you mean 'params'?)"),
    ({"type": "LionMuon", "params": [1]}, "write an object of parameters"),
    ({"type": "LionMuon", "params": {"learning_rate": 1}}, "LionMuon has no parameter 'learning_rate'"),
    ({"type": "LionMuon", "params": {"perod": 2}}, "LionMuon has no parameter 'perod' (did you mean 'period'?)"),
    ({"type": "Lion", "params": {"aux_lr": 1e-3}}, "Lion has no parameter 'aux_lr'"),
    ({"type": "LionMuon", "params": {"lr": -1e-3}}, "lr is -0.001: write a finite number that is not negative"),
    ({"type": "LionMuon", "params": {"lr": "auto"}}, "lr is 'auto': write a number"),
    ({"type": "LionMuon", "params": {"betas": [0.9, 1.0]}}, "betas is 1.0: write a number in [0, 1)"),
    ({"type": "LionMuon", "params": {"betas": [-0.1, 0.9]}}, "betas is -0.1: write a number in [0, 1)"),
    ({"type": "LionMuon", "params": {"betas": 0.9}}, "betas is 0.9: write a pair of numbers"),
    ({"type": "LionMuon", "params": {"period": 0}}, "period is 0: write a whole number from 1"),
    ({"type": "LionMuon", "params": {"period": 1.5}}, "period is 1.5: write a whole number from 1"),
    ({"type": "LionMuon", "params": {"weight_decay": -1}}, "weight_decay is -1"),
    ({"type": "Muon", "params": {"momentum": 1}}, "momentum is 1: write a number in [0, 1)"),
    ({"type": "Muon", "params": {"scale": "spectrl"}}, "(did you mean 'spectral'?)"),
    ({"type": "Muon", "params": {"aux": "adam"}}, "(did you mean 'adamw'?)"),
    ({"type": "Muon", "params": {"polar": {"step": 3}}}, "step"),
    ({"type": "Muon", "params": {"exchange": {"bucket": 3}}}, "(did you mean 'bucket_mb'?)"),
    ({"type": "Muon", "params": {"matrix_exclude": ["nothing"]}}, "the pattern 'nothing' matches no parameter"),
    ({"type": "Muon", "params": {"matrix_exclude": "embed"}}, "matrix_exclude is 'embed': write a list of patterns"),
    ({"type": "Muon", "params": {"matrix_exclude": ["("]}}, "'(' is no regular expression"),
    ({"type": "Muon", "params": {"matrix_exclude_defaults": "no"}}, "matrix_exclude_defaults is 'no': write true or"),
    ({"type": "Muon", "params": {"matrix_exclude_default": False}}, "did you mean 'matrix_exclude_defaults'"),
    ({"type": "Muon", "params": {"views": [{"match": "q_proj", "heads": 2}]}}, "the pattern 'q_proj' matches no"),
    ({"type": "Muon", "params": {"views": [{"heads": 2}]}}, 'has no "match"'),
    ({"type": "Muon", "params": {"views": [{"match": "body.weight", "head": 2}]}}, "did you mean 'heads'?"),
    ({"type": "Muon", "params": {"views": [{"match": "body.weight", "heads": 3}]}}, "heads 3 does not divide 4 rows"),
]


@pytest.mark.parametrize(("section", "part"), BAD_SECTIONS, ids=[part for _, part in BAD_SECTIONS])
def test_a_mistake_in_the_optimizer_section_is_one_line(section: Any, part: str) -> None:
    given = config(optimizer=section)
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        ds_optim.from_config(Small(), given)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_from_config_refuses_an_optimizer_that_is_not_ours() -> None:
    with pytest.raises(UserError, match=r"'AdamW' is no optimizer of ds_optim.*deepspeed\.initialize"):
        ds_optim.from_config(Small(), config(optimizer={"type": "AdamW", "params": {"lr": 1e-3}}))


def test_names_of_ours_in_any_writing() -> None:
    for name in ("LionMuon", "lion_muon", "lionmuon", "LIONMUON", "lion-muon"):
        assert canonical_type(name) == "LionMuon"
    assert canonical_type("AdamW") == "AdamW"
    assert canonical_type("deepspeed:Lion") == "deepspeed:Lion"


def test_from_config_returns_what_deepspeed_needs_and_leaves_the_callers_config_alone(tmp_path: Path) -> None:
    given = config(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}, gradient_clipping=0.5)
    before = copy.deepcopy(given)
    optimizer, prepared = ds_optim.from_config(Small(), given)
    assert given == before
    assert type(optimizer).__name__ == "LionMuon"
    assert "optimizer" not in prepared
    assert prepared["zero_allow_untested_optimizer"] is True
    assert prepared["zero_force_ds_cpu_optimizer"] is False
    assert prepared["zero_optimization"] == before["zero_optimization"]
    assert prepared["gradient_clipping"] == 0.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    assert ds_optim.from_config(Small(), path)[1] == prepared
    old = config(zero_optimization={"stage": 2, "cpu_offload": True})
    assert ds_optim.from_config(Small(), old)[1]["zero_force_ds_cpu_optimizer"] is False


def test_a_parameter_in_two_groups() -> None:
    model = Small()
    groups = [*ds_optim.param_groups(model), *ds_optim.param_groups(model)]
    with pytest.raises(UserError, match=r"body\.weight is in the parameter groups 'matrix' and 'matrix 2'"):
        ds_optim.Muon(groups)


def test_groups_that_are_not_ours() -> None:
    model = Small()
    with pytest.raises(UserError, match=r"ds_optim\.param_groups\(model\)"):
        ds_optim.Muon([{"params": list(model.parameters())}])
    with pytest.raises(UserError, match=r"ds_optim\.param_groups\(model\)"):
        ds_optim.Muon(model.parameters())
    with pytest.raises(UserError, match=r"ds_optim\.param_groups\(model\)"):
        ds_optim.Muon([])


def test_parameters_and_models_that_are_treated_apart() -> None:
    model = Small()
    model.body.weight.use_muon = True  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"body\.weight.*use_muon is set"):
        ds_optim.from_config(model, config())
    with pytest.raises(UserError, match="use_muon is set"):
        check_parameters(list(model.named_parameters()))

    class PipelineModule(nn.Module):
        def topology(self) -> Any:
            return types.SimpleNamespace(get_axis_names=lambda: ["pipe", "data", "model"], get_dim=lambda axis: 2)

    with pytest.raises(UserError, match="tensor parallelism within a pipeline"):
        check_model(PipelineModule())
    check_model(Small())


def test_an_engine_is_checked_like_its_config() -> None:
    settings = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}
    check_engine(types.SimpleNamespace(config={"zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match="compute_grad_norm"):
        check_engine(types.SimpleNamespace(config=settings))
    with pytest.raises(UserError, match=r'^bf16\.enabled is "auto", which Trainer, Accelerate'):
        check_engine(types.SimpleNamespace(config={"bf16": {"enabled": "auto"}}))  # DeepSpeed trains in fp32 then
    with pytest.raises(UserError, match=r"given in code and in the config \('AdamW'\)"):
        check_engine(types.SimpleNamespace(config={"optimizer": {"type": "AdamW"}}))
    module = type("DualPipeModule", (type("PipelineModule", (), {}),), {})()
    with pytest.raises(UserError, match="stage is 2 and the model a PipelineModule"):
        check_engine(types.SimpleNamespace(config={"zero_optimization": {"stage": 2}}, module=module))


def test_reasons_of_what_stays_refused_are_deepspeeds() -> None:
    """What steps with an Adam of its own, and what is built for CUDA alone."""
    from deepspeed.compile.util import is_deepcompile_supported
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder
    from deepspeed.ops.op_builder.dc import DeepCompileBuilder
    from deepspeed.runtime.superoffload import superoffload_utils
    from deepspeed.runtime.zenflow import engine_stage3, zenflow_stage_1_and_2

    assert superoffload_utils.DeepSpeedCPUAdam is not None
    assert zenflow_stage_1_and_2.ZenFlowSelectiveAdamW is not None
    assert engine_stage3.ZenFlowSelectiveAdamW_stage3 is not None
    assert issubclass(DeepCompileBuilder, CUDAOpBuilder)
    assert is_deepcompile_supported() == (os.environ.get("DS_ACCELERATOR") == "cuda")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_deepspeed_reads_swapped_state_back_as_fp32(dtype: torch.dtype) -> None:
    """Why state in files is refused: whatever it was, it gets the partition's length and dtype."""
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo

    partition, state = torch.zeros(8), torch.ones(8, dtype=dtype)
    partition.ds_id, state.ds_id = "0", "exp_avg-0"  # type: ignore[attr-defined]
    swapped = OptimizerStateSwapInfo(partition, 8, "folder", None)
    swapped.add_state_tensors([state])
    swapped.release_memory()
    assert partition.numel() == 0, "nor is there anything to check the layout by"
    swapped.set_swap_buffers([torch.zeros(8), torch.zeros(8)], 8)
    assert state.dtype == torch.float32
