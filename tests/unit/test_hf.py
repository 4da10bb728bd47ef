"""The "optimizer" of a JSON that a trainer has read: what "auto" becomes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_optim
import ds_optim.hf
from ds_optim.errors import UserError
from ds_optim.hf.config import fill_params, take_section
from ds_optim.hf.trainer import arguments_for, as_written
from tests.distributed.models import TinyNet

AUTO = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "period": 2}


@dataclass
class Arguments:
    """What is read of transformers' TrainingArguments, with its defaults."""

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    deepspeed: Any = None


def accelerator(config: dict[str, Any] | None) -> Any:
    plugin = None if config is None else SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


def lion_muon(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "lion_muon", "params": params}, "zero_optimization": {"stage": 0}}


def test_auto_is_what_the_arguments_say_and_adams_own_defaults_are_not_taken() -> None:
    assert arguments_for(AUTO, Arguments(learning_rate=3.0, weight_decay=0.5)) == {"lr": 3.0, "weight_decay": 0.5}
    said = arguments_for(AUTO, Arguments(adam_beta2=0.9, adam_epsilon=1e-6))
    assert (said["betas"], said["eps"]) == ([0.9, 0.9], 1e-6)
    assert arguments_for({"lr": 1.0}, Arguments(adam_beta2=0.9)) == {}, "what is written is not touched"


def test_auto_without_an_argument_is_the_optimizers_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert fill_params(AUTO, {"lr": 1.0, "weight_decay": 0.5}) == {"lr": 1.0, "weight_decay": 0.5, "period": 2}
    assert capsys.readouterr().out == 'ds_optim: "auto" is the optimizer\'s own default for betas, eps\n'
    assert fill_params({"lr": 1.0}, {"lr": 1.0}) == {"lr": 1.0}
    assert fill_params({"lr": 1.0, "heads": "auto"}, {}) == {"lr": 1.0, "heads": "auto"}, "that is a value of its own"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("params", "arguments", "said"),
    [
        (AUTO, {}, 'optimizer.params.lr is "auto" and no rate is given: pass lr=…'),
        ({"lr": 1.0}, {"weight_decay": 0.1}, 'write "weight_decay": "auto" there'),
        ({"lr": 1.0}, {"lr": 2.0}, "optimizer.params.lr is 1.0 in the JSON and 2.0 in code"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(params: Any, arguments: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        fill_params(params, arguments)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_json_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer has filled Adam's betas into the section that it keeps."""
    written, filled = lion_muon(**AUTO), {"type": "lion_muon", "params": {**AUTO, "betas": [0.9, 0.999]}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    for source in (written, str(path)):
        assert as_written(filled, Arguments(deepspeed=source)) == written["optimizer"]
    assert as_written(filled, Arguments()) == filled
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert as_written(filled, Arguments()) == written["optimizer"]
    other = {"type": "Muon", "params": {}}
    assert as_written(other, Arguments()) == other, "another JSON than the one that is trained by"


def test_only_our_types_are_taken_out() -> None:
    for section in ({"type": "AdamW", "params": {}}, {"type": "deepspeed:Muon", "params": {}}):
        config = {"optimizer": section}
        assert take_section(config) is None
        assert config == {"optimizer": section}
    config = lion_muon()
    assert take_section(config) == {"type": "lion_muon", "params": {}}
    assert "optimizer" not in config
    assert take_section(config) is None
    with pytest.raises(UserError, match="did you mean 'LionMuon'"):
        take_section({"optimizer": {"type": "LionMoun"}})


def test_an_accelerators_json_gives_the_optimizer_and_what_zero_asks_for() -> None:
    config = {**lion_muon(lr="auto"), "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    built = ds_optim.hf.optimizer(accelerator(config), TinyNet(), lr=0.25)
    assert type(built) is ds_optim.LionMuon
    assert built.defaults["lr"] == 0.25
    assert "optimizer" not in config
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False, "or Accelerate puts DeepSpeed's CPU Adam in its place"
    for made, said in (
        (accelerator(config), "names no optimizer of ds_optim"),
        (accelerator(None), "without DeepSpeed"),
    ):
        with pytest.raises(UserError, match=said):
            ds_optim.hf.optimizer(made, TinyNet())


def test_numbers_look_through_wrappers_and_refuse_what_is_not_ours() -> None:
    own = ds_optim.LionMuon(ds_optim.param_groups(TinyNet()), lr=1.0, sign_lr_ratio=8)
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=own))
    assert ds_optim.hf.stepping(wrapped) is own
    assert ds_optim.hf.numbers(wrapped) == {"matrix/lr": 1.0, "aux/lr": 0.125, "vector/lr": 0.125}
    other = SimpleNamespace(optimizer=torch.optim.SGD(TinyNet().parameters(), lr=1.0))
    with pytest.raises(RuntimeError, match="SGD steps, which is none of ds_optim's"):
        ds_optim.hf.stepping(other)
