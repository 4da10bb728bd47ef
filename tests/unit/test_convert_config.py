"""``ds-optim convert-config``: rates by published ratios, each change with its reason, one line for bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ds_optim.cli.app import main
from ds_optim.errors import UserError
from ds_optim.zero.conversion import convert
from ds_optim.zero.conversion.rates import RATIOS
from ds_optim.zero.conversion.sections import GONE
from ds_optim.zero.refused import REFUSED_SETTINGS
from ds_optim.zero.support import check_config
from tests.cases import TYPES
from tests.shipped import AUTO, SHIPPED

Config = dict[str, Any]


def config_of(kind: str, /, **params: Any) -> Config:
    return {"optimizer": {"type": kind, "params": params}, "zero_optimization": {"stage": 2}, "train_batch_size": 8}


def params_of(config: Config, to: str, **options: float) -> Config:
    done = convert(config, to, **options)
    assert done.config["optimizer"]["type"] == to
    params: Config = done.config["optimizer"]["params"]
    return params


def test_every_optimizer_has_a_ratio() -> None:
    assert set(RATIOS) == set(TYPES)


ADAMW = config_of("AdamW", lr=2e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
ONE_BIT = config_of("OneBitAdam", lr=2e-3, weight_decay=0.1, freeze_step=400, cuda_aware=False)
LION = config_of("Lion", lr=2e-4, betas=[0.95, 0.98], weight_decay=1.0)
THEIR_MUON = config_of(
    "Muon",
    lr=1e-3,
    muon_lr=0.02,
    adam_lr=3e-4,
    betas=[0.9, 0.95],
    momentum=0.9,
    weight_decay=0.1,
    ns_method="gram",
    per_head_muon=True,
)
PERIOD = {"period": 2, "sign_lr_ratio": 10}


@pytest.mark.parametrize(
    ("given", "to", "expected"),
    [
        (ADAMW, "LionMuon", {"lr": 2e-3, "weight_decay": 0.1, **PERIOD}),
        (ADAMW, "SignMuon", {"lr": 6e-3, "weight_decay": 0.1, "period": 2, "sign_lr_ratio": 30}),
        (ADAMW, "Lion", {"lr": 2e-4, "weight_decay": 1.0}),
        (ADAMW, "Muon", {"lr": 2e-3, "weight_decay": 0.1, "scale": "match_rms_adamw", "aux_lr": 2e-4}),
        (ADAMW, "StableAdamW", {"lr": 2e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}),
        (ONE_BIT, "LionMuon", {"lr": 2e-3, "weight_decay": 0.1, **PERIOD}),
        (config_of("Adam"), "LionMuon", {"lr": 1e-3, "weight_decay": 0.0, **PERIOD}),
        (LION, "LionMuon", {"lr": 2e-3, "weight_decay": 0.1, **PERIOD, "betas": [0.95, 0.98]}),
        (LION, "Lion", {"lr": 2e-4, "weight_decay": 1.0, "betas": [0.95, 0.98]}),
        (
            THEIR_MUON,
            "LionMuon",
            {"lr": 1e-3, "weight_decay": 0.1, **PERIOD, "heads": AUTO}
            | {"aux": "adamw", "aux_lr": 3e-4, "aux_betas": [0.9, 0.95]},
        ),
        (
            THEIR_MUON,
            "Muon",
            {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "heads": AUTO}
            | {"aux": "adamw", "aux_lr": 3e-4, "aux_betas": [0.9, 0.95]},
        ),
        (config_of("Muon", lr=1e-3, scale="match_rms_adamw"), "Lion", {"lr": 1e-4, "weight_decay": 0.0}),
    ],
)
def test_rates_follow_the_published_ratios(given: Config, to: str, expected: Config) -> None:
    assert params_of(given, to) == expected


def test_what_the_trainer_fills_in_stays_and_betas_do_not() -> None:
    done = convert(SHIPPED["axolotl zero1"], "LionMuon")
    assert done.config["optimizer"]["params"] == {"lr": AUTO, "weight_decay": AUTO, **PERIOD}
    assert "optimizer.params.lr" in done.left
    lion = convert(SHIPPED["llama-factory z3"], "Lion")
    assert lion.config["optimizer"]["params"] == {"lr": AUTO, "weight_decay": AUTO}
    assert any("give the trainer a learning_rate of 0.1 times AdamW's" in line for line in lion.changes)
    assert any("weight_decay of 10 times AdamW's" in line for line in lion.changes)


def test_flags_say_what_the_trainer_would() -> None:
    given = SHIPPED["llama-factory z3"]
    assert params_of(given, "Lion", lr=1e-5, weight_decay=0.01) == {"lr": 1e-6, "weight_decay": 0.1}
    assert params_of(given, "Muonlight", lr=1e-5)["aux_lr"] == 1e-6
    assert params_of(LION, "Lion", weight_decay=0.05)["weight_decay"] == 0.5
    assert params_of(LION, "Lion", lr=1e-3)["lr"] == 1e-4


def test_a_schedule_moves_with_the_rate() -> None:
    given = ADAMW | {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-3}}}
    params = convert(given, "Lion").config["scheduler"]["params"]
    assert params == {"warmup_min_lr": 0, "warmup_max_lr": 2e-4}
    assert convert(given, "LionMuon").config["scheduler"] == given["scheduler"]


VALUES = {"device": "nvme", "ratio": 0.5, "compute_grad_norm": False, "check_grad_overflow": False, "zenflow": {"a": 1}}
VALUES |= {"stages": 2}
VALUES |= dict.fromkeys(("autotp_size", "tp_size"), 2)


@pytest.mark.parametrize("path", GONE)
def test_what_deepspeed_has_no_more_goes(path: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    *above, key = path.split(".")
    given = config_of("AdamW", lr=1e-3) | {"train_batch_size": 1, "bf16": {"enabled": False}}
    (given.setdefault(above[0], {}) if above else given)[key] = {"enabled": True}
    with pytest.raises(Exception, match=r"removed|no longer"):
        DeepSpeedConfig(copy.deepcopy(given))
    done = convert(given, "Lion")
    DeepSpeedConfig(copy.deepcopy(done.config))
    assert any(path in line for line in done.changes)
    assert done.config["bf16"]["enabled"] is (path == "amp")


@pytest.mark.parametrize("path", [path for path, _, _ in REFUSED_SETTINGS])
def test_what_is_refused_is_changed(path: str) -> None:
    *above, key = path.split(".")
    given = config_of("AdamW", lr=1e-3)
    owner = given
    for name in above:
        owner = owner.setdefault(name, {})
    owner[key] = VALUES.get(key, True)
    with pytest.raises(UserError):
        check_config(given)
    done = convert(given, "Lion")
    check_config(done.config)
    assert any(line.startswith(f"{path}: ") for line in done.changes)


def test_what_is_set_beside_the_optimizer() -> None:
    given = THEIR_MUON | {
        "zero_optimization": {"stage": 3, "reduce_scatter": False, "offload_optimizer": {"device": "cpu"}}
    }
    config = convert(given, "Muon").config
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    unscaled = config_of("Adam", lr=1e-3, max_grad_norm=0.5) | {
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": True},
    }
    done = convert(unscaled, "Lion").config
    assert done["zero_optimization"]["stage"] == 1
    assert done["gradient_clipping"] == 0.5


def test_a_config_that_runs_keeps_what_it_says() -> None:
    given = config_of("LionMuon", lr=1e-3, weight_decay=0.1, period=5, sign_lr_ratio=30, matrix_exclude=["embed"])
    given |= {"zero_allow_untested_optimizer": True}
    done = convert(given, "lion_muon")
    assert done.config == given
    by_head = config_of("LionMuon", lr=1e-3, heads=AUTO, matrix_exclude=["embed"])
    assert params_of(by_head, "Muonlight")["matrix_exclude"] == ["embed"]
    assert params_of(by_head, "Muonlight")["heads"] == AUTO
    assert "optimizer.params.heads" not in convert(by_head, "Muonlight").left


@pytest.mark.parametrize(
    ("text", "arguments", "line"),
    [
        ("{}", "--to AdamW", "--to 'AdamW' is no optimizer of ds_optim: write one of"),
        ("[1]", "", "holds no JSON object"),
        ('{"optimizer": {"params": {}}}', "", '"optimizer" names no type'),
        ('{"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0.1}}}', "", "did you mean 'weight_decay'?"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}', "", "optimizer.params.lr is 'fast'"),
        ('{"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}', "", "add --lr, a rate that AdamW would have here"),
        ('{"train_batch_size": 8}', "--to Muonlight", "Muonlight needs more than that one: add --lr"),
        ('{"train_batch_size": 8}', "--lr -1", "--lr is -1.0: write a finite number that is not negative"),
        ('{"zero_optimization": {"stage": 7}}', "", "zero_optimization.stage is 7"),
        ('{"zero_optimization": {"stage": 2, "overlap_com": true}}', "", "did you mean 'overlap_comm'?"),
    ],
)
def test_bad_input_is_one_line(
    text: str, arguments: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["convert-config", str(path), *arguments.split()])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert line in shown.err


def test_stdout_is_the_json_alone_and_a_file_is_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ADAMW))
    with pytest.raises(SystemExit) as ended:
        main(["convert-config", str(path)])
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(shown.out)["optimizer"]["type"] == "LionMuon"
    assert "optimizer.params.betas: taken out (AdamW's; LionMuon has its own)" in shown.err
    with pytest.raises(SystemExit) as ended:
        main(["convert-config", str(path), "--out", str(path)])
    assert ended.value.code == 2
    assert "says something else already: add --force" in capsys.readouterr().err
    assert json.loads(path.read_text()) == ADAMW


@pytest.mark.parametrize(("dtype", "stage"), [("float16", 2), ("torch.half", 1), (None, 0), (None, 3)])
def test_autocast_in_fp16_becomes_bf16_where_deepspeed_cannot_scale(dtype: str | None, stage: int) -> None:
    autocast = {"enabled": True, **({} if dtype is None else {"dtype": dtype})}
    config = {**ADAMW, "torch_autocast": autocast, "zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match="torch_autocast"):
        check_config(config)
    done = convert(config, "Lion")
    assert done.config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    check_config(done.config)


def test_autocast_that_works_stays() -> None:
    for dtype, stage in (("bfloat16", 3), ("float16", 0)):
        autocast = {"enabled": True, "dtype": dtype}
        config = {**ADAMW, "torch_autocast": autocast, "zero_optimization": {"stage": stage}}
        assert convert(config, "Lion").config["torch_autocast"] == autocast
