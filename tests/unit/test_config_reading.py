"""One reader for every JSON: what DeepSpeed reads is read as DeepSpeed reads it, what it would not gets one line."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.cli.estimate import _read as read_of_estimate
from ds_optim.cli.reshard import _config as read_of_reshard
from ds_optim.cli.train import train_settings
from ds_optim.errors import UserError
from ds_optim.job.settings import parse_object
from ds_optim.memory.estimate_sources import load_shape, zero_settings
from ds_optim.zero.auto import BATCH_KEYS, batch_sizes, fill_auto, hidden_size_of
from ds_optim.zero.complaints import SECTIONS, as_user_errors, complaint
from ds_optim.zero.reading import load_config
from ds_optim.zero.values import DTYPES, NUMBERS, OBJECTS, SWITCHES, check_monitors, understood

TAKEN = {
    "plain": '{"train_batch_size": 8, "zero_optimization": {"stage": 3}}',
    "comments": '// whole lines\n{\n# and\n"train_batch_size": 8, /* within */ "bf16": {"enabled": true} // after\n}',
    "a comma too many": '{"train_batch_size": 8, "optimizer": {"params": {"betas": [0.9, 0.99,],},},}',
    "a mark of UTF-8": '\ufeff{"train_batch_size": 8}',
    "numbers": '{"a": 5e8, "b": 1e-3, "c": 2.0, "d": -1}',
    "slashes in strings": '{"path": "a//b#c", "other": "/*"}',
    "no quotes": "{\n  train_batch_size: 8\n  bf16: {enabled: true}\n}",
    "Python's words": '{\n"prescale_gradients": True,\n"gradient_clipping": NaN\n}',
}
TWICE = {
    "section": '{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 0}}',
    "within": '{"optimizer": {"type": "Lion", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "lr": 1.0}}}',
    "in a list": '{"optimizer": {"params": {"views": [{"match": "a", "heads": 2, "match": "b"}]}}}',
    "with comments": '{\n// one\n"train_batch_size": 8,\n# two\n"train_batch_size": 16\n}',
}


def deepspeeds(given: str) -> dict[str, Any]:
    """What DeepSpeed reads of a path or of base64, without the checks that follow."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig.__new__(DeepSpeedConfig)
    with contextlib.suppress(Exception):
        read.__init__(given)
    found: dict[str, Any] = dict(read._param_dict)
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_what_deepspeed_reads_is_read_alike(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(TAKEN[name], encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == deepspeeds(str(path))
    encoded = base64.urlsafe_b64encode(TAKEN[name].lstrip("\ufeff").encode()).decode()
    if load_config(path) and TAKEN[name].lstrip("\ufeff").startswith("{"):
        assert load_config(encoded) == deepspeeds(encoded)


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_stands_twice_is_refused_as_deepspeed_does(name: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path / "ds.json"
    path.write_text(TWICE[name])
    with pytest.raises(ValueError, match="Duplicate keys"):
        DeepSpeedConfig(str(path))
    with pytest.raises(UserError, match=r"ds\.json has the key '\w+' twice in one object: keep one of them$"):
        load_config(path)


DOORS: dict[str, Callable[[Path], Any]] = {
    "from_config": lambda path: ds_optim.from_config(nn.Linear(2, 2), path),
    "train": lambda path: train_settings({}, path),
    "estimate": read_of_estimate,
    "reshard": read_of_reshard,
    "a list of parameters": lambda path: load_shape(str(path), None),
    "a flag": lambda path: parse_object(path.read_text(), "--optimizer-params"),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_the_one_reader(door: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(TWICE["section"])
    with pytest.raises(UserError, match="has the key 'zero_optimization' twice"):
        DOORS[door](path)


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for content, line in (
        (b"", "is empty: write a JSON object"),
        (b" \n", "is empty: write a JSON object"),
        (b"[1, 2]", "holds no JSON object: a DeepSpeed config is one"),
        (b"true", "holds no JSON object"),
        (b'{"a": "\xe9"}', r"is not JSON in UTF-8 \(at byte 7\): save it as UTF-8"),
        (b'{"optimizer": ', r"is not JSON \(line 1: "),
        (b'{"a": 1,\n"b": NaN}', r"is not JSON \(line 2: .*None or NaN"),
        (b'{"a": 1e999}', "is not JSON that DeepSpeed reads"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=line) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    for wrong, line in (
        (tmp_path / "missing.json", r"cannot read the config '.*missing\.json': No such file"),
        ("bm90IGEgY29uZmln", "cannot read the config 'bm90IGEgY29uZmln': No such file"),  # base64 of no config
        (tmp_path, "cannot read the config .*: Is a directory"),
        (7, "the DeepSpeed config is 7: pass a dict or the path of a JSON"),
    ):
        with pytest.raises(UserError, match=line):
            load_config(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    "value", ["true", "True", 1, 1.0, "yes", "on", "false", 0, "no", "2", 2, "maybe", None, [], "True,"]
)
@pytest.mark.parametrize("section", ["bf16", "bfloat16", "fp16"])
def test_switches_mean_what_they_mean_to_deepspeed(section: str, value: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    given = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, section: {"enabled": value}}
    try:
        read = DeepSpeedConfig(given)
    except Exception:
        with pytest.raises(UserError, match=rf"{section}\.enabled is .*: write true or false"):
            understood(given)
        return
    found = understood(given)[section]["enabled"]
    assert found is (read.float16_config if section == "fp16" else read.bfloat16_config).enabled
    assert given[section] == {"enabled": value}, "the caller's own stays as it is"


def test_sections_are_typed_and_auto_stays() -> None:
    zero = {"stage": "2", "reduce_bucket_size": 5e8, "overlap_comm": "false", "stage3_max_live_parameters": "auto"}
    offload = {"device": "cpu", "pin_memory": "auto"}
    found = understood({"zero_optimization": {**zero, "offload_optimizer": offload}})["zero_optimization"]
    typed = {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": False, "stage3_max_live_parameters": "auto"}
    assert found == {**typed, "offload_optimizer": offload}
    assert [type(found[key]) for key in zero] == [int, int, bool, str]


@pytest.mark.parametrize("path", SWITCHES)
def test_a_string_where_deepspeed_types_nothing_is_refused(path: str) -> None:
    for value in ("false", "true", "auto"):
        given: Any = value
        for key in reversed(path.split(".")):
            given = {key: given}
        with pytest.raises(
            UserError, match=rf"{path} is '{value}', which DeepSpeed takes for true: write true or false"
        ):
            understood(given)


def test_untyped_settings_are_those_that_deepspeed_reads() -> None:
    """A misspelt name would refuse nothing."""
    import deepspeed.datastates.config as datastates
    from deepspeed.autotuning import constants as autotuning
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing import config as checkpointing
    from deepspeed.runtime.data_pipeline import constants as pipeline

    modules = (constants, profiling, checkpointing, pipeline, autotuning, datastates)
    names = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    source = Path(deepspeed_config.__file__).read_text()
    sections = {section.split(".")[0] for section in SECTIONS.values()} | {"bfloat16", "aio"}
    sections |= set(DeepSpeedMonitorConfig.model_fields)
    for path in (*SWITCHES, *NUMBERS, *DTYPES, *OBJECTS):
        for part in path.split("."):
            assert part in names | sections or f'"{part}"' in source or f"'{part}'" in source, path


def test_a_string_is_true_to_deepspeed() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig({"train_batch_size": 1, "prescale_gradients": "false"}).prescale_gradients == "false"
    assert DeepSpeedConfig({"train_batch_size": 1, "torch_autocast": {"enabled": "auto"}}).torch_autocast_enabled


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimization": {"overlap_com": True}},
        "no setting 'zero_optimization.overlap_com' (did you mean 'overlap_comm'?)",
    ),
    ({"zero_optimization": {"qwertz": 1}}, "there is no setting 'zero_optimization.qwertz': take it out"),
    ({"zero_optimization": {"stage3_max_live_params": 1}}, "(did you mean 'stage3_max_live_parameters'?)"),
    (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "no setting 'zero_optimization.offload_optimizer.devise' (did you mean 'device'?)",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
        "zero_optimization.offload_optimizer.device is 'gpu': write 'none', 'cpu' or 'nvme'",
    ),
    ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param is 'cpu': write an object of settings"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: write 0, 1, 2 or 3"),
    ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size is '5e8': write a whole number"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size is 0: write a number greater than 0"),
    ({"zero_optimization": None}, "zero_optimization is None: write an object of settings, or leave it out"),
    ({"bf16": {"enabled": True, "loss_scale": 0}}, "no setting 'bf16.loss_scale'; known: enabled, "),
    ({"bfloat16": {"enable": True}}, "no setting 'bfloat16.enable' (did you mean 'enabled'?)"),
    ({"bf16": True}, "bf16 is True: write an object of settings"),
    ({"fp16": {"enabled": True, "loss_scale": "x"}}, "fp16.loss_scale must be a number"),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "bfloat16 and fp16 modes cannot be simultaneously enabled",
    ),
    (
        {"elasticity": {"max_train_batch_size": 8}},
        "DeepSpeed does not take this config: Elastic training has been removed",
    ),
    ({"tensorboard": {"enable": True}}, "no setting 'tensorboard.enable' (did you mean 'enabled'?)"),
    ({"wandb": True}, "wandb is True: write an object of settings"),
    ({"scheduler": "WarmupLR"}, "scheduler is 'WarmupLR': write an object of settings"),
    ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
    ({"communication_data_type": 8}, "DeepSpeed does not take this config: AttributeError"),
    ({"data_types": {"grad_accum_dtype": "float8"}}, "data_types.grad_accum_dtype is 'float8': write \"fp32\""),
    ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0': write a number that is not negative"),
    ({"gradient_clipping": None}, "gradient_clipping is None: write a number"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping is nan: write a number"),
    ({"steps_per_print": "10"}, "steps_per_print is '10': write a number"),
    ({"train_batch_size": "8"}, "train_batch_size is '8': write a whole number from 1"),
    ({"train_micro_batch_size_per_gpu": 1.5}, "train_micro_batch_size_per_gpu is 1.5: write a whole number from 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: write a whole number from 1"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_deepspeed_refuses_or_misreads_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        understood(given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_models_name_leads_to_its_section(title: str) -> None:
    section = SECTIONS[title] or "wandb"
    given: dict[str, Any] = {"no_such_key": 1}
    for key in reversed(section.split(".")):
        given = {key: given}
    with pytest.raises(UserError, match=f"there is no setting '{section}.no_such_key'"):
        understood(given)


def test_a_monitor_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_optim.zero.values.find_spec", lambda name: None)
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")):
        with pytest.raises(UserError, match=f"{section}.enabled is true, .*pip install {package}"):
            check_monitors({section: {"enabled": "true"}})
        check_monitors({section: {"enabled": False}})


def test_what_is_no_complaint_about_the_config_keeps_its_type() -> None:
    def fails(action: Callable[[], Any]) -> Exception:
        try:
            action()
        except Exception as error:
            return error
        raise AssertionError("it did not fail")

    import deepspeed
    from deepspeed.runtime.lr_schedules import WarmupLR
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    theirs = (
        lambda: WarmupLR(sgd, warmup_num_steps=0),
        lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=-1),
        lambda: DeepSpeedZeroConfig(stage="two"),
        lambda: deepspeed.initialize(model=None, config={}),
    )
    for action in theirs:
        with pytest.raises(UserError) as caught, as_user_errors():
            action()
        assert caught.value.__cause__ is not None, "where it arose stays known"
    users: tuple[Callable[[], Any], ...] = (
        lambda: [][1],  # a user's own code, called back
        lambda: int("x"),
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: DeepSpeedZeroConfig.model_fields["nothing"],
    )
    for action in users:
        error = fails(action)
        assert complaint(error) is None
        with pytest.raises(type(error)), as_user_errors():
            action()


# ------------------------------------------------------------------------------------------------- "auto"


def test_batch_sizes_are_derived_as_deepspeed_derives_them() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    both_refuse = 0
    for ranks, *sizes in itertools.product((1, 2, 3), (None, 1, 6, 7, 12), (None, 1, 2, 4), (None, 1, 3)):
        theirs = DeepSpeedConfig.__new__(DeepSpeedConfig)
        theirs.world_size = ranks
        for key, size in zip(BATCH_KEYS, sizes, strict=True):
            setattr(theirs, key, size)
        given = {key: "auto" if size is None else size for key, size in zip(BATCH_KEYS, sizes, strict=True)}
        try:
            theirs._configure_train_batch_size()
        except AssertionError:
            both_refuse += 1
            with pytest.raises(UserError, match=r"the config gives no batch size|is not micro_batch"):
                batch_sizes(given, ranks)
        else:
            assert batch_sizes(given, ranks) == tuple(getattr(theirs, key) for key in BATCH_KEYS)
    assert 20 < both_refuse < 120


def test_auto_becomes_what_follows_and_the_rest_is_refused() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": "auto", "stage3_max_live_parameters": 7}
    zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 10}
    optimizer = {"type": "Lion", "params": {"lr": 0.5}}
    given: dict[str, Any] = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    given |= {"optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": warmup}}
    fill_auto(given, 40)
    assert "train_batch_size" not in given
    sizes = [1600, 1440, 400, 7]
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    assert [given["zero_optimization"][key] for key in (*keys, "stage3_max_live_parameters")] == sizes
    assert warmup == {"warmup_min_lr": 0.0, "warmup_max_lr": 0.5, "warmup_num_steps": 10}
    for path in ("bf16.enabled", "gradient_clipping", "zero_optimization.stage", "scheduler.params.total_num_steps"):
        wanted: Any = "auto"
        for key in reversed(path.split(".")):
            wanted = {key: wanted}
        with pytest.raises(UserError, match=f'^{path} is "auto", which Trainer, Accelerate .* write '):
            fill_auto(json.loads(json.dumps(wanted)), None)


def test_reshard_and_estimate_take_what_an_engine_would_get(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": "2", "parameter_alignment": "false", "overlap_comm": "yes", "reduce_bucket_size": "auto"}
    path.write_text(json.dumps({"zero_optimization": zero}))
    found = read_of_reshard(path)
    assert found is not None
    assert found["zero_optimization"] == {**zero, "stage": 2, "parameter_alignment": False, "overlap_comm": True}
    shape = load_shape("qwen3-tiny", None)
    assert zero_settings(read_of_estimate(path), shape) == {"overlap_comm": True, "reduce_bucket_size": 128**2}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert zero_settings(autocast, shape) == {"autocast": True, "dtype": "fp32"}
    assert zero_settings({**autocast, "bf16": {"enabled": True}}, shape) == {"autocast": True}
    filled: dict[str, Any] = dict(found)
    fill_auto(filled, 128)
    assert filled["zero_optimization"]["reduce_bucket_size"] == 128**2


def test_the_hidden_size_is_where_transformers_looks_for_it() -> None:
    from transformers import GPT2Config, Qwen3Config
    from transformers.models.gemma3 import Gemma3Config

    assert hidden_size_of(Qwen3Config(hidden_size=48)) == 48
    assert hidden_size_of(GPT2Config(n_embd=24)) == 24
    assert hidden_size_of(Gemma3Config(text_config={"hidden_size": 56})) == 56
    assert hidden_size_of(None) is None


def test_from_config_keeps_auto_for_trainer_and_accelerate() -> None:
    """The config that transformers' documentation shows, whole."""
    given: dict[str, Any] = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "LionMuon", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **dict.fromkeys((*BATCH_KEYS, "gradient_clipping"), "auto"),
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    prepared = ds_optim.from_config(nn.Linear(4, 4), given)[1]
    del given["optimizer"]
    assert {key: prepared[key] for key in given} == given
