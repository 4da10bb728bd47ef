"""What a run reads besides its settings, changed between a save and a resume, or on one rank alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.job.settings import make_settings
from ds_optim.matrix import dispatch
from ds_optim.survival import manifest
from ds_optim.survival.inputs import check_inputs
from ds_optim.survival.reshard_seal import seal_like
from ds_optim.train.loop import train
from tests.distributed.harness import assert_all_raised, run_ranks

from .survival import log_of, tiny

LINES = [f"To be, or not to be, that is question {number}." for number in range(400)]


def start_of(folder: Path) -> dict[str, Any]:
    """Settings of a run over a text of its own, by a tokenizer of a folder, beside which its files lie."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return tiny(data="text.jsonl", tokenizer="hf:tokenizer", steps=3, save_every=3, out="out", stage=1, **POLAR)


POLAR = {"optimizer": "muon", "optimizer_params": {"lr": 1e-3}}


def make_tokenizer(folder: Path, lines: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    from ds_optim.data.tokens import train_bpe

    folder.mkdir()
    (folder / "plain.json").write_text(train_bpe(lines, 257))
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "plain.json"), eos_token=end).save_pretrained(folder)


def change_text(folder: Path) -> None:
    lines = [LINES[0].replace("To be", "To bee"), *LINES[1:]]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def change_model(folder: Path, **values: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    backend = json.loads(path.read_text())
    backend["model"]["merges"] = backend["model"]["merges"][1:] or []
    backend["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(backend))


def change_polar(folder: Path) -> None:
    import torch

    dispatch.store(torch.device("cpu"), {dtype: {"gram_from": 1.05, "strips": {}} for dtype in ("float32", "bfloat16")})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    # what is done: (how, the name that accepts it)
    "a word of the text": (change_text, "text"),
    "eps": (lambda folder: change_model(folder, rms_norm_eps=1e-3), "model"),
    "dropout": (lambda folder: change_model(folder, attention_dropout=0.3), "model"),
    "rope": (lambda folder: change_model(folder, rope_parameters={"rope_theta": 5.0, "rope_type": "default"}), "model"),
    "the tokenizer": (change_tokenizer, "tokenizer"),
    "a table of bench polar": (change_polar, "polar"),
}


def resumed(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """For each change the lines of a resume, of one that accepts another name, of one that goes on, and of the next."""
    os.chdir(folder)
    os.environ["DS_OPTIM_CACHE"] = str(folder / "cache")
    given = start_of(folder)
    make_tokenizer(folder / "tokenizer", LINES)
    train(make_settings(**given))
    found: dict[str, list[str]] = {"nothing": [_line({**given, "steps": 4, "resume": True})]}
    shutil.copytree(folder, folder.parent / "as_it_was")
    for what, (change, name) in CHANGES.items():
        place = folder.parent / what
        shutil.copytree(folder.parent / "as_it_was", place)
        os.chdir(place)
        os.environ["DS_OPTIM_CACHE"] = str(place / "cache")
        change(place)
        settings = {**given, "steps": 5, "resume": True}
        others = [other for other in ("text", "model", "tokenizer", "polar") if other != name]
        found[what] = [
            _line(settings),
            _line({**settings, "accept": others}),
            _line({**settings, "accept": [name]}),
            _line({**settings, "steps": 6}),
        ]
    return found


def _line(given: dict[str, Any]) -> str:
    try:
        train(make_settings(**given))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_inputs_that_changed_are_refused_or_accepted_by_name(place: Path) -> None:
    found = run_ranks(1, resumed, place, init=False, timeout=200)[0]
    assert found.pop("nothing") == [""]
    for what, (_, name) in CHANGES.items():
        plain, other, accepted, after = found[what]
        assert f"--accept {name} to go on" in plain, (what, plain)
        assert "changed since out/checkpoints/step-4 was saved" in plain
        assert "\n" not in plain
        assert other == plain, what
        assert accepted == "", (what, accepted)
        assert after == "", "what was accepted is what the next checkpoint says"
        steps = [line["step"] for line in log_of(place.parent / what / "out") if "loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_says_nothing_of_inputs_goes_on_with_a_line() -> None:
    """As all of earlier releases do; one of the first is resumed in test_survival."""
    said = check_inputs(make_settings(**tiny()), {"text": "1"}, SimpleNamespace(notes={}))  # type: ignore[arg-type]
    assert said == ("the checkpoint does not say what text, model and tokenizer it was trained with: not compared",)


# ---- on one rank alone


def one_rank_changed(rank: int, world_size: int, folder: Path, what: str) -> None:
    """Each rank has a folder of its own, as on nodes without a common disk; rank 1's has been changed."""
    place = folder / str(rank)
    shutil.copytree(folder / "model", place / "model")
    make_tokenizer(place / "tokenizer", LINES)
    given = start_of(place)
    if rank == 1:
        CHANGES[what][0](place)
    os.chdir(place)
    train(make_settings(**{**given, "out": None, "save_every": 0, "stage": 3, "zero_init": True}))


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a word of the text", "disagree on the text of --data"),
        ("eps", "disagree on the model's config"),
        ("the tokenizer", "disagree on the tokenizer"),
    ],
)
def test_ranks_that_read_other_inputs_are_told(place: Path, what: str, says: str) -> None:
    outcomes = run_ranks(2, one_rank_changed, place, what, timeout=60, expect_error=True)
    assert_all_raised(outcomes, "UserError", says)


# ---- handed to another optimizer


@pytest.mark.parametrize(("handed_over", "left"), [(True, {"text": "1"}), (False, {"text": "1", "polar": "2"})])
def test_a_reshard_to_another_optimizer_forgets_how_the_old_one_orthogonalized(
    tmp_path: Path, handed_over: bool, left: dict[str, str]
) -> None:
    notes = {"step": 3, "world_size": 2, "trajectory": {"stage": 1}, "inputs": {"text": "1", "polar": "2"}}
    folder = tmp_path / "step-3"
    folder.mkdir()
    (folder / "file.pt").write_bytes(b"1")
    seal = seal_like(notes, handed_over=handed_over)
    assert seal is not None
    seal(SimpleNamespace(processes=2, stage=1)).finish(folder)  # type: ignore[arg-type]
    assert manifest.read(folder).notes["inputs"] == left
