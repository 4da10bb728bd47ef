"""Recipes: each is a run that ``ds-optim train`` takes, with its source's batch, tokens and model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ds_optim.cli import main
from ds_optim.cli.dry_run import plan_rows
from ds_optim.cli.train import train_settings
from ds_optim.errors import UserError
from ds_optim.job.recipes import FOLDER, Recipe, load_recipe
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.zero.config import is_ours

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
#: Parameters, and tokens of the whole run, as the sources say them.
SAID = {
    "lasm-134m": (134e6, 50_000 * 4.2e6),
    "spectral_lion-134m": (134e6, 20 * 134e6),
    "stable_lion-134m": (134e6, 20 * 134e6),
    "lion_muon-124m": (124e6, 1.05e9),
    "lion_muon-355m": (355e6, 8.2e9),
    "lion_muon-720m": (709e6, 3_500 * 64 * 31 * 512),
    "lion-124m": (124e6, 2.1e9),
    "signum-124m": (124e6, 2.1e9),
    "muonlight-124m": (124e6, 2.1e9),
}


def test_every_recipe_is_known_here() -> None:
    assert sorted(SAID) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_run_that_its_source_describes(name: str) -> None:
    recipe = load_recipe(name)
    settings = train_settings({}, None, recipe, recipe.ranks)
    assert is_ours(settings.optimizer)
    parameters, tokens = SAID[name]
    shape = load_shape(settings.model or settings.preset, None, settings.seq_len)
    assert shape.numel == pytest.approx(parameters, rel=0.01)
    assert settings.steps * recipe.tokens_per_step == pytest.approx(tokens, rel=0.01)
    assert settings.resolved_params()["lr"] == recipe.train["optimizer_params"]["lr"]


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 512), (8, 64), (64, 8), (512, 1)])
def test_the_batch_is_the_sources_on_any_ranks(ranks: int, accumulation: int) -> None:
    assert train_settings({}, None, load_recipe("lasm-134m"), ranks).accumulation == accumulation


def test_flags_win_and_bring_what_belongs_to_them() -> None:
    recipe = load_recipe("lion_muon-124m")
    small = {"preset": "qwen3-tiny", "steps": 3, "micro_batch": 2, "seq_len": 64}
    settings = train_settings(small, None, recipe, 1)
    assert (settings.preset, settings.model, settings.warmup) == ("qwen3-tiny", None, 0)
    assert settings.accumulation == 128
    assert settings.resolved_params()["period"] == 2
    other = train_settings({"optimizer": "lion"}, None, recipe, 1)
    assert "period" not in other.resolved_params()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_per_step": 5}, "train takes 131,072 tokens a step on 8 ranks, not 5"),
        ({"unsaid": {"lrr": "?"}}, "unsaid names 'lrr', which is no setting of a run"),
        ({"train": {"preset": "qwen3-tiny", "stepz": 3}}, "there is no setting 'stepz' (did you mean 'steps'?)"),
        ({"source": None}, "source is None"),
        ({"sauce": 1}, "there is no setting 'sauce' (did you mean 'source'?)"),
    ],
)
def test_a_wrong_recipe_is_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = copy.deepcopy(json.loads((FOLDER / "lion-124m.json").read_text("utf-8"))) | change
    (tmp_path / "r.json").write_text(json.dumps(content), "utf-8")
    if "train" not in change:
        content["train"]["model"] = str(FOLDER / "models" / "gpt2-124m.json")
        (tmp_path / "r.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.json"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused() -> None:
    recipe = load_recipe("lion-124m")
    with pytest.raises(UserError, match="131,072 tokens a step are no whole number of micro-batches: 16 sequences"):
        train_settings({}, None, recipe, 3)
    with pytest.raises(UserError, match="give --recipe or --config, one of the two"):
        train_settings({}, Path("ds.json"), recipe)
    with pytest.raises(UserError, match=r"no recipe 'lion-124' \(did you mean 'lion-124m'\?\)"):
        load_recipe("lion-124")
    assert isinstance(recipe, Recipe)


def test_ranks_that_share_sequences_read_a_batch_once() -> None:
    settings = train_settings({"preset": "qwen3-tiny", "seq_len": 64, "micro_batch": 2}, None)
    cut = settings.model_copy(update={"deepspeed": {"sequence_parallel_size": 2}})
    said = [dict(plan_rows(one, 4, None, None))["step"] for one in (settings, cut)]
    assert [line.rsplit("= ")[1] for line in said] == ["512 tokens", "256 tokens"]


def test_the_dry_run_says_tokens_memory_and_hours(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--recipe", "lasm-134m", "--dry-run", "--tokens-per-s", "1e6"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (None, 0)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {name: text for name, text in lines}
    assert said["run"] == "50,000 steps, 209.72B tokens, 1563.8 a parameter"
    assert said["time"] == "58.3 hours at 1,000,000 tokens/s"
    assert "at ZeRO-1 in bf16" in said["memory"]
    assert "seq_len: the preset's" in " ".join(text for name, text in lines if name == "not")
