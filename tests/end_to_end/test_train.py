"""The training job as a user runs it: several ranks, every stage, interrupted, resumed and misused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.job.results import Moment, TrainResult
from ds_optim.job.settings import make_settings
from ds_optim.train.loop import train
from tests.distributed.harness import assert_all_raised, run_ranks
from tests.tiers import cells

STEPS = 6
SAVED = 3
ADAMW = {"optimizer": "AdamW", "optimizer_params": {"lr": 3e-3}}
LION_MUON = {"optimizer": "lion_muon", "optimizer_params": {"lr": 1e-2, "period": 2}}


def small_model(folder: Path) -> dict[str, Any]:
    """Settings of a model with odd sizes that trains in milliseconds, its config written into ``folder``."""
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=257,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        intermediate_size=52,
        tie_word_embeddings=False,
        attention_dropout=0.1,
    ).save_pretrained(folder)
    return {"model": str(folder), "seq_len": 32, "micro_batch": 4, "eval_batches": 2, "dtype": "fp32", "steps": STEPS}


class Interrupted(Exception):
    """What ends a run in the middle."""


class StopAt:
    """An observer that ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.losses: list[float] = []

    def on_start(self, engine: Any) -> None:
        pass

    def on_moment(self, engine: Any, moment: Moment) -> None:
        pass

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        self.losses.append(loss)
        if step == self.step:
            raise Interrupted

    def on_end(self, engine: Any) -> None:
        raise AssertionError("an interrupted run has no end")


def interrupted_and_resumed(given: dict[str, Any], out: Path) -> tuple[TrainResult, list[float], TrainResult]:
    """A whole run; the losses of one that stops after a checkpoint and a step more; and that one resumed."""
    whole = train(make_settings(**given, save_every=SAVED, out=out / "whole"))
    stop = StopAt(SAVED + 1)
    with pytest.raises(Interrupted):
        train(make_settings(**given, save_every=SAVED, out=out / "cut"), stop)
    resumed = train(make_settings(**given, save_every=SAVED, out=out / "cut", resume=True))
    return whole, stop.losses, resumed


def resume_everywhere(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    model = small_model(folder / f"model{rank}")
    model["model"] = str(folder / "model0")
    runs = {}
    for stage, optimizer in cells([(3, LION_MUON)], product((1, 3), (ADAMW, LION_MUON))):
        name = f"{optimizer['optimizer']}-{stage}"
        runs[name] = interrupted_and_resumed({**model, **optimizer, "stage": stage}, folder / name)
    return runs


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    ranks = run_ranks(2, resume_everywhere, tmp_path, timeout=300)
    for name, (whole, cut, resumed) in ranks[0].items():
        # the same seed gives the same losses, and a checkpoint gives back all that decides them
        assert cut == whole.losses[: SAVED + 1], name
        assert resumed.losses == whole.losses[SAVED:], name
        assert resumed.val_loss == whole.val_loss, name
        assert resumed.steps == STEPS
        assert len(set(whole.losses)) == STEPS
        lines = [json.loads(line) for line in (tmp_path / name / "cut" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1)), name
        assert [line["loss"] for line in lines if "loss" in line] == whole.losses, name
    assert {n: run[2].losses for n, run in ranks[0].items()} == {n: run[2].losses for n, run in ranks[1].items()}


def with_shards(rank: int, world_size: int, folder: Path, size: int) -> dict[str, Any]:
    """A run whose ranks hold shards, stopped and resumed; with one rank the same run of the whole model."""
    given = {
        "preset": "qwen3-tiny",
        "seq_len": 32,
        "micro_batch": 4,
        "eval_batches": 2,
        "dtype": "fp32",
        "steps": STEPS,
    }
    given |= {**LION_MUON, "stage": 2, "deepspeed": {"tensor_parallel": {"autotp_size": size}}}
    return {"run": interrupted_and_resumed(given, folder / str(size))}


@pytest.mark.full
def test_tensor_parallel_ranks_share_a_batch_and_resume(tmp_path: Path) -> None:
    ((alone, *_),) = (found["run"] for found in run_ranks(1, with_shards, tmp_path, 1, timeout=150))
    for whole, losses, resumed in (found["run"] for found in run_ranks(2, with_shards, tmp_path, 2, timeout=150)):
        assert whole.losses[: SAVED + 1] == losses
        assert whole.losses[SAVED:] == resumed.losses
        assert whole.val_losses[STEPS] == resumed.val_losses[STEPS]
        assert whole.losses == pytest.approx(alone.losses, abs=2e-3)
        assert whole.parameters == alone.parameters


def with_parts(rank: int, world_size: int, folder: Path, size: int, stage: int) -> dict[str, Any]:
    """A run whose ranks share sequences, stopped and resumed; with one rank the same run of whole ones."""
    given = {"preset": "qwen3-tiny", "seq_len": 32, "micro_batch": 4, "eval_batches": 2, "dtype": "fp32"}
    given |= {**LION_MUON, "steps": STEPS, "stage": stage, "deepspeed": {"sequence_parallel_size": size}}
    return {"run": interrupted_and_resumed(given, folder / f"{size} at {stage}")}


@pytest.mark.full
@pytest.mark.parametrize("stage", cells([], [3], [2]))
def test_ranks_that_share_sequences_train_as_one_does(stage: int, tmp_path: Path) -> None:
    ((alone, *_),) = (found["run"] for found in run_ranks(1, with_parts, tmp_path, 1, stage, timeout=150))
    for whole, losses, resumed in (found["run"] for found in run_ranks(2, with_parts, tmp_path, 2, stage, timeout=150)):
        assert whole.losses[: SAVED + 1] == losses
        assert whole.losses[SAVED:] == resumed.losses
        assert whole.val_losses[STEPS] == resumed.val_losses[STEPS]
        assert whole.losses == pytest.approx(alone.losses, abs=2e-3)
        assert whole.val_losses[STEPS] == pytest.approx(alone.val_losses[STEPS], abs=2e-3)
        assert whole.tokens_per_s > 0


def same_batch(rank: int, world_size: int, folder: Path) -> dict[str, TrainResult]:
    from transformers.models.qwen3 import Qwen3Config

    model = small_model(folder / f"of{world_size}rank{rank}")
    # dropout is drawn per rank, so that it is off where runs of different ranks are to agree
    config = Qwen3Config.from_pretrained(model["model"], attention_dropout=0.0)
    config.save_pretrained(model["model"])
    model.update(micro_batch=4 // world_size, model=model["model"])
    runs = {}
    for stage, zero_init in ((0, False), (3, False), (3, True)):
        # the same settings on every rank: the folder is the first rank's
        model["model"] = str(folder / f"of{world_size}rank0")
        settings = make_settings(**model, **LION_MUON, stage=stage, zero_init=zero_init, clip=0.0)
        runs[f"{stage}{' zero.Init' if zero_init else ''}"] = train(settings)
    return runs


@pytest.mark.full
def test_ranks_stages_and_zero_init_train_alike(tmp_path: Path) -> None:
    alone = run_ranks(1, same_batch, tmp_path, timeout=200)[0]
    shared = run_ranks(2, same_batch, tmp_path, timeout=200)[0]
    for name in alone:
        assert shared[name].losses == pytest.approx(alone["0"].losses, rel=2e-4), name
        assert shared[name].val_loss == pytest.approx(alone["0"].val_loss, rel=2e-4), name
        assert shared[name].parameters == alone["0"].parameters, name
    # weights made in pieces are the weights made whole
    assert shared["3 zero.Init"].losses == shared["3"].losses


def learn(rank: int, world_size: int, out: Path) -> TrainResult:
    settings = make_settings(
        optimizer="lion_muon",
        stage=2,
        dtype="bf16",
        steps=60,
        seq_len=64,
        eval_every=30,
        tensorboard=True,
        save_every=60,
        out=out,
    )
    return train(settings)


@pytest.mark.full
def test_tiny_preset_learns_from_context_in_bf16_and_leaves_its_records(tmp_path: Path) -> None:
    result = run_ranks(2, learn, tmp_path, timeout=300)[0]
    assert 3.2 < result.unigram_entropy < 3.4
    assert result.entropy_ratio < 0.9
    assert result.val_losses[60] == result.val_loss < result.val_losses[30]
    assert result.skipped_steps == 0
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert (tmp_path / "checkpoints" / "step-60" / "manifest.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [30, 60]
    first = lines[0]
    assert set(first) == {"step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "skipped"}
    assert first["grad_norm"] > 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": "nowhere.txt"}, "no such file or folder"),
    ({"data": "EMPTY"}, "holds no text"),
    ({"data": "SHORT"}, "fewer than one sequence"),
    ({"out": "EMPTY/below"}, "cannot write to --out"),
    ({"optimizer": "lion_muonn"}, "LionMuon"),
    ({"optimizer_params": {"perod": 2}}, "period"),
    ({"optimizer_params": {"lr": -1.0}}, "lr"),
    ({"model": None, "preset": "qwen3-tiny", "tokenizer": "hf:EMPTY"}, "cannot load the tokenizer"),
    ({"resume": True, "out": "FRESH"}, "no complete checkpoint"),
    ({"deepspeed": {"train_batch_size": 7}}, "train_batch_size 7"),
    ({"deepspeed": {"zero_optimization": {"overlap_com": True}}}, "did you mean 'overlap_comm'?"),
    ({"deepspeed": {"zero_optimization": {"overlap_com": 1}}, "stage": 3, "zero_init": True}, "overlap_comm"),
    ({"deepspeed": {"wandb": {"enabled": True}}}, "pip install wandb"),
    ({"optimizer": "deepspeed:Muon", "stage": 3}, "reduce scatter"),
    ({"optimizer": "AdamW", "optimizer_params": {"btas": 1}}, "unexpected keyword argument 'btas'"),
]


def misuse(rank: int, world_size: int, folder: Path) -> list[str]:
    """The line of every mistake on this rank."""
    model = {**small_model(folder / f"model{rank}"), "model": str(folder / "model0"), "optimizer": "lion_muon"}
    lines = []
    for mistake, _ in BAD:
        given = {
            name: value.replace("EMPTY", str(folder / "empty.txt"))
            .replace("SHORT", str(folder / "short.txt"))
            .replace("FRESH", str(folder / "fresh"))
            if isinstance(value, str)
            else value
            for name, value in mistake.items()
        }
        try:
            train(make_settings(**{**model, **given}))
            lines.append("it trained")
        except UserError as error:
            lines.append(str(error))
    return lines


@pytest.mark.full
def test_mistakes_are_one_line_on_every_rank_and_hang_none(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    first, second = run_ranks(2, misuse, tmp_path, timeout=120)
    assert first == second
    for line, (mistake, message) in zip(first, BAD, strict=True):
        assert message in line, mistake
        assert "\n" not in line


def lonely_mistake(rank: int, world_size: int, folder: Path) -> None:
    """The text is missing on rank 1 alone, as on a node that does not share the folder."""
    os.chdir(folder / str(rank))
    train(make_settings(**{**small_model(folder / str(rank)), "model": str(folder / "0"), "data": "text.txt"}))


@pytest.mark.full
def test_mistake_of_one_rank_ends_all(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "0" / "text.txt").write_text("To be, or not to be. " * 100)
    outcomes = run_ranks(2, lonely_mistake, tmp_path, timeout=60, expect_error=True)
    assert_all_raised(outcomes, "UserError", "no such file or folder")
    (tmp_path / "1" / "text.txt").write_text("That is the question. " * 100)
    outcomes = run_ranks(2, lonely_mistake, tmp_path, timeout=60, expect_error=True)
    assert_all_raised(outcomes, "UserError", "rank 0 and rank 1 disagree on the text of --data")


def other_run(rank: int, world_size: int, folder: Path) -> list[str]:
    model = {**small_model(folder / "model"), **LION_MUON, "steps": 2, "out": folder / "out", "save_every": 2}
    train(make_settings(**model))
    lines = []
    for change in ({}, {"resume": True, "seed": 5}, {"resume": True, "steps": 1, "warmup": 0}):
        with pytest.raises(UserError) as caught:
            train(make_settings(**{**model, **change}))
        lines.append(str(caught.value))
    return lines


@pytest.mark.full
def test_checkpoints_are_not_written_over_nor_continued_by_another_run(tmp_path: Path) -> None:
    over, seed, steps = run_ranks(1, other_run, tmp_path, timeout=100)[0]
    assert "holds checkpoints of an earlier run; add --resume" in over
    assert "had seed = 0, this one has 5" in seed
    assert "had steps = 2, this one has 1" in steps


def timed(rank: int, world_size: int, folder: Path) -> tuple[int, list[float]]:
    model = {**small_model(folder / "model"), **LION_MUON, "save_every": 100, "out": folder / "out"}
    cut = train(make_settings(**model, time_limit_s=1e-6))
    rest = train(make_settings(**model, resume=True))
    return cut.steps, cut.losses + rest.losses


@pytest.mark.full
def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    steps, losses = run_ranks(1, timed, tmp_path, timeout=100)[0]
    assert steps == 1
    assert len(losses) == STEPS


# ---- the commands themselves


def command(arguments: list[str], cwd: Path, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # the launcher finds the interpreter's own ninja and python beside it
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def launched(*arguments: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    return [*launcher, "--master_port", str(port), "--module", "ds_optim", "train", *arguments]


@pytest.mark.full
def test_launcher_starts_two_ranks(tmp_path: Path) -> None:
    small_model(tmp_path / "model")
    arguments = "--model model --optimizer lion --stage 3 --seq-len 16 --steps 2 --eval-batches 1 --out out"
    done = command(launched(*arguments.split()), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stderr
    assert "validation loss (nats/token)" in done.stdout
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.full
def test_launcher_ends_with_the_line_of_a_mistake(tmp_path: Path) -> None:
    done = command(launched("--data", "nowhere.txt"), tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("ds-optim: error: ")]
    assert lines
    assert all("no such file or folder" in line for line in lines)
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    small_model(tmp_path / "model")
    arguments = "-m ds_optim train --model model --optimizer muon --seq-len 16 --steps 2 --eval-batches 1"
    done = command([sys.executable, *arguments.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 rank(s)" in done.stderr
    missing = command([sys.executable, "-m", "ds_optim", "train", "--data", "nowhere.txt"], tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("ds-optim: error: --data 'nowhere.txt': no such file")
    assert "Traceback" not in missing.stderr
