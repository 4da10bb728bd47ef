"""Estimates of memory: formulas to the byte, the ZeRO paper's example, what fits, and the command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ds_optim.cli.app import main
from ds_optim.errors import UserError
from ds_optim.job.models import build_model, preset_config
from ds_optim.memory.estimate import MemoryEstimate, estimate, layout_of
from ds_optim.memory.estimate_fit import fewest_ranks, fits, largest_micro_batch, parse_size
from ds_optim.memory.estimate_model import ModelShape, Parameter, Transformer, shape_of_count, shape_of_list
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_passes import Batch, ModelPasses, by_formula
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.passes import Moment
from ds_optim.memory.rehearsal import COUNTED
from ds_optim.memory.side_by_side import EstimateRequest, estimate_rows
from ds_optim.memory.tracker import TensorTracker
from ds_optim.optimizers import LionMuon, param_groups
from ds_optim.report.estimate_table import to_tables

GIB = 2**30
STATE_BYTES = {("adamw", "float32"): 8, ("lion", "float32"): 4, ("lion_muon", "bfloat16"): 2}


@cache
def tiny() -> ModelShape:
    return load_shape("qwen3-tiny", None)


def run(
    model: ModelShape, optimizer: str = "lion", momentum_dtype: str = "float32", transients: bool = True, **zero: Any
) -> MemoryEstimate:
    plan = plan_optimizer(model, optimizer, momentum_dtype=momentum_dtype)
    return estimate(model, plan, ZeroSettings(**zero), transients=transients)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("optimizer", "dtype"), STATE_BYTES)
def test_state_is_the_formula_to_the_byte(optimizer: str, dtype: str, stage: int, ranks: int) -> None:
    found = run(tiny(), optimizer, dtype, stage=stage, ranks=ranks)
    each = STATE_BYTES[optimizer, dtype]
    units = layout_of(found.optimizer, found.zero).units
    padding = sum(unit.padding(rank) for unit in units for rank in range(ranks)) if stage else 0
    copies = 1 if stage else ranks
    assert found.total("state") == each * (tiny().numel * copies + padding)
    assert found.total("padding") == (each + 4) * padding


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_int8_is_at_most_1_05_bytes(stage: int, ranks: int) -> None:
    found = run(tiny(), "lion", "int8", stage=stage, ranks=ranks)
    each = found.total("state") / tiny().numel / (1 if stage else ranks)
    assert 1 + 4 / 256 <= each <= 1.05
    assert set(found.largest.state) == {"exp_avg_codes", "exp_avg_scale"}


def test_more_ranks_than_there_can_be_are_refused() -> None:
    with pytest.raises(UserError, match="ranks is 100000000000: write at most 131,072"):
        ZeroSettings(stage=3, ranks=10**11)


@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_zero_papers_7_5b_at_64_ranks(stage: int, published: float) -> None:
    """Rajbhandari et al. 2019, figure 1: 16-bit gradients accumulate whole at stage 1."""
    found = run(shape_of_count(7.5e9), "adamw", stage=stage, ranks=64, param_persistence_threshold=0)
    digits = 0 if published == 120 else 1
    assert round(found.largest.most_model_states / 1e9, digits) == published


@pytest.mark.parametrize("ranks", [1, 4, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_fp32_momentum_saves_4_bytes_over_n(stage: int, ranks: int) -> None:
    model = shape_of_count(2**27)
    saved = [run(model, name, stage=stage, ranks=ranks).largest.most_model_states for name in ("adamw", "lion")]
    assert saved[0] - saved[1] == 4 * 2**27 // ranks
    percent = 100 * (1 - saved[1] / saved[0])
    if ranks == 64:
        assert percent == pytest.approx({1: 1.5, 2: 2.8, 3: 25.0}[stage], abs=0.3)


def test_without_accumulation_stage_1_holds_no_more_gradients_than_stage_2() -> None:
    first, second = (run(tiny(), stage=stage, ranks=2, accumulation=1).largest for stage in (1, 2))
    assert first.most_model_states == first.model_states == second.model_states
    assert run(tiny(), stage=1, ranks=2).largest.accumulating > 0


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    shapes = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=6))
    return shape_of_list("drawn", [{"name": f"layers.{i}.weight", "shape": shape} for i, shape in enumerate(shapes)])


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from([1, 2, 3]), st.integers(1, 5), st.sampled_from([7, 50, 10**9]))
def test_sums_over_ranks_are_the_layouts_partitions(model: ModelShape, stage: int, ranks: int, sub_group: int) -> None:
    found = run(model, "lion_muon", stage=stage, ranks=ranks, sub_group_size=sub_group, param_persistence_threshold=0)
    partitions = ranks * sum(unit.partition_numel for unit in layout_of(found.optimizer, found.zero).units)
    assert found.total("master") == found.total("state") == 4 * partitions
    assert found.total("weights") == 2 * partitions * (1 if stage == 3 else ranks)
    assert partitions >= model.numel
    assert found.total("padding") == 8 * (partitions - model.numel)


def test_frozen_parameters_have_weights_alone() -> None:
    frozen = Parameter(name="frozen", shape=(1000,), role="frozen")
    model = ModelShape(name="m", parameters=(Parameter(name="w", shape=(1000,), role="vector"), frozen))
    for stage, weights in ((0, 4000), (2, 4000), (3, 2000)):
        rank = run(model, stage=stage, ranks=2, param_persistence_threshold=0).largest
        assert rank.weights == weights
        assert rank.optimizer_state == (4000 if stage == 0 else 2000)


def test_offload_leaves_weights_and_buckets_on_the_accelerator() -> None:
    here, there = (run(tiny(), stage=2, ranks=2, offload=offload).largest for offload in (False, True))
    assert there.host == there.gradients + there.master + there.optimizer_state
    assert there.peak() < here.peak()
    assert there.model_states > here.model_states, "gradients on the host are fp32"
    first = run(tiny(), stage=1, ranks=2, offload=True).largest
    assert first.at_peak()["gradients"] == first.accumulating == 2 * tiny().numel, "stage 1 reduces them after the last"


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_node_holds_what_its_ranks_leave_on_the_host(tensor: int) -> None:
    zero = ZeroSettings(stage=3, ranks=1, offload=True)
    asked = {"model": tiny(), "optimizers": ("lion",), "stages": (2,), "ranks": (8,), "zero": zero, "tensor": tensor}
    of_node, of_all = (estimate_rows(EstimateRequest(**asked, node_ranks=n))[0] for n in (4, 8))
    held = [rank.on_host for rank in of_all.estimate.ranks for _ in range(tensor)]
    assert (of_node.host_of_node, of_all.host_of_node) == (max(sum(held[:4]), sum(held[4:])), sum(held))


def test_exchange_scratch_grows_with_buckets_and_matrices_only() -> None:
    quiet, small, large = (
        estimate(tiny(), plan_optimizer(tiny(), name, params), ZeroSettings(stage=3, ranks=2)).largest.exchange
        for name, params in (
            ("lion", {}),
            ("lion_muon", {"exchange": {"bucket_mb": 0.1}}),
            ("lion_muon", {"exchange": {"bucket_mb": 64}}),
        )
    )
    assert quiet == 0 < small < large
    matrices = sum(p.numel for p in tiny().parameters if p.role == "matrix")
    assert large < 2 * matrices * 8, "one bucket: what travels, stacks, results and the scratch of Newton-Schulz"


@pytest.mark.parametrize("bucket_mb", [0.5, 256])
def test_exchange_scratch_is_what_a_step_allocates(bucket_mb: float) -> None:
    """Between the matrices' scratch and that with the chunks of elementwise steps, which kernels may do without."""
    params = {"polar": {"dtype": "float32"}, "exchange": {"bucket_mb": bucket_mb}, "period": 1}
    model = build_model(preset_config("qwen3-tiny", 257, 128), 0)
    optimizer = LionMuon(param_groups(model), **params)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with TensorTracker() as tracker:
        optimizer.step()
    plan = plan_optimizer(tiny(), "lion_muon", params, weights=torch.float32, device="cpu")
    said = estimate(tiny(), plan, ZeroSettings(stage=0, ranks=1, dtype="fp32", device="cpu")).largest
    assert said.exchange <= tracker.peak_bytes - tracker.base_bytes <= said.exchange + said.chunks + 64


def test_deepspeed_muon_keeps_more_than_a_partition() -> None:
    ours, theirs = (run(tiny(), name, stage=2, ranks=3).largest for name in ("muon", "deepspeed:Muon"))
    assert set(theirs.state) == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    partition = ours.optimizer_state // 4
    assert theirs.state["momentum_buffer"] > 2 * partition * 0.9
    assert theirs.buckets > ours.buckets


def test_batches_and_gpus_are_monotone() -> None:
    model = load_shape("qwen3-134m", None)
    passes = ModelPasses(model, Batch()).at
    memory = {ranks: run(model, stage=3, ranks=ranks, transients=False).largest for ranks in (1, 2, 8, 64)}
    batches = [largest_micro_batch(memory[8], size * GIB, passes) for size in (2, 8, 24, 80)]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1]
    by_ranks = [largest_micro_batch(memory[ranks], 8 * GIB, passes) for ranks in (1, 2, 8, 64)]
    assert by_ranks == sorted(by_ranks)
    best = by_ranks[2]
    assert memory[8].peak(passes(best)) <= 0.9 * 8 * GIB < memory[8].peak(passes(best + 1))


@pytest.mark.full
def test_fewest_gpus_fit_and_one_less_does_not() -> None:
    model = shape_of_count(2e8)

    def at(ranks: int) -> Any:
        return run(model, "adamw", stage=3, ranks=ranks, transients=False, reduce_bucket_size=10**6).largest

    needed = {size: fewest_ranks(at, size * GIB) for size in (1, 2, 4, 80)}
    found = [count for count in needed.values() if count is not None]
    assert found == sorted(found, reverse=True)
    assert len(found) == 4
    count = needed[2]
    assert count is not None
    assert 1 < count <= 8
    assert at(count).peak() <= 0.9 * 2 * GIB < at(count - 1).peak()
    assert fewest_ranks(at, GIB // 100) is None


def test_what_runs_on_no_shapes_follows_a_formula_and_says_by_how_much_it_may_be_short() -> None:
    shape = Transformer(
        layers=2, hidden=8, intermediate=16, heads=2, key_value_heads=1, head_dim=4, vocabulary=10, gated=True
    )
    layer = 4 * 8 + 2 * 8 + 2 * 4 + 4 * 16
    batch = Batch(micro_batch=3, seq_len=5)
    found = by_formula(shape, batch, largest=7, elements=50)
    assert found.kept == found.most - 7 * 2 == 15 * (2 * (2 * layer + 8) + 10 * 10)
    assert found.moments[-1] == Moment(held=7 * 2, made=50)
    assert found.short == pytest.approx(0.3 * found.most, rel=0.01)

    def kept(shape: Transformer = shape, **changed: Any) -> int:
        return by_formula(shape, replace(batch, **changed)).kept

    assert kept(checkpointing=True) == 15 * (2 * (2 * 8 + layer + 8) + 100)
    scores = 15 * 2 * 5 * 2
    assert kept(attention="eager") - kept() == kept(replace(shape, fused=False)) - kept() == scores * 6
    dropped = replace(shape, dropout=True)
    assert (kept(dropped), kept(dropped, device="cpu") - kept()) == (kept(), scores * 9)
    assert kept() - kept(loss_chunks=3) == 10 * 10 * 10
    assert kept() - kept(liger_loss=True) == 15 * 100 - 8 * 10 * 2 - 10 * 8 * 2
    tied = by_formula(replace(shape, tied=True), batch, largest=10**6, elements=50)
    assert tied.most == tied.moments[-1].held == 3 * 2 * 10**6, "the head's, the embedding's, and their sum"
    room = run(tiny(), stage=0, ranks=1).largest
    size = int((room.peak(found) + found.short) / 0.9) + 1
    assert fits(room, size, found)
    assert not fits(room, size - 2, found)


def test_size_of_a_gpu() -> None:
    assert parse_size("80GiB") == 80 * GIB
    assert parse_size("80 GB") == parse_size("80g") == 80 * 10**9
    for wrong in ("large", "80 gigs", "-3GiB", "0GB", "80i"):
        with pytest.raises(UserError, match="such as 80GiB"):
            parse_size(wrong)


def test_models_from_files(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 211, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_folder, by_file = load_shape(str(tmp_path), None), load_shape(str(tmp_path / "config.json"), None)
    assert by_folder.numel == by_file.numel == 115_648, "the tied head counts once"
    assert by_folder.transformer == by_file.transformer
    assert by_file.transformer is not None
    assert (by_file.transformer.intermediate, by_file.transformer.gated) == (256, False)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"embed.weight": [11, 4], "layers.0.w": [4, 4], "layers.0.b": [4]}))
    shape = load_shape(str(listed), None)
    assert [p.role for p in shape.parameters] == ["aux", "matrix", "vector"]
    assert shape.largest_layer == 44


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_command_prints_rows_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 1000, "sub_group_size": "auto"}})
    )
    words = "--model qwen3-tiny --optimizers adamw,lion --momentum-dtype float32,int8 --stages 3 --nodes 1,2 --json"
    extra = ["--config", str(tmp_path / "ds.json"), "--gpu-memory", "80GiB"]
    rows = json.loads(table(capsys, *words.split(), *extra))
    assert [(row["optimizer"], row["momentum_dtype"], row["ranks"]) for row in rows] == [
        (name, dtype, ranks)
        for ranks in (8, 16)
        for name, dtype in (("adamw", "float32"), ("lion", "float32"), ("lion", "int8"))
    ]
    assert rows[0]["saving_percent_of_adamw"]["optimizer_state"] == 0
    assert rows[1]["saving_percent_of_adamw"]["optimizer_state"] == pytest.approx(50)
    assert rows[1]["reduce_bucket_size"] == 1000
    assert rows[1]["sum_over_ranks"]["optimizer_state"] == 8 * rows[1]["per_rank"]["optimizer_state"]
    assert rows[1]["fewest_gpus"] == 1
    assert rows[1]["largest_micro_batch"] > 1
    assert rows[1]["activations_are"] == COUNTED


def test_activations_are_of_a_ranks_part_of_a_sequence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"sequence_parallel_size": 4}))
    words = ["--model", "qwen3-tiny", "--optimizers", "lion", "--stages", "3", "--ranks", "8", "--json", "--seq-len"]
    cut = json.loads(table(capsys, *words, "1024", "--config", str(tmp_path / "ds.json")))
    part = json.loads(table(capsys, *words, "256"))
    assert cut == part


@pytest.mark.full
def test_command_prints_a_table_and_draws_curves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = table(capsys, "--params", "1e6", "--ranks", "4", "--optimizers", "lion", "--out", str(tmp_path))
    assert "1,000,000 parameters" in printed
    assert "widths are not known" in printed
    assert printed.count("lion") == 4, "a row for each stage"
    for name in ("model_states", "saving"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


@pytest.mark.parametrize("width", [44, 80, 100, 120])
def test_every_number_stands_in_lines_of_any_width(width: int) -> None:
    names = ("adamw", "lion", "lion_muon", "stable_lion", "spectral_lion", "muon")
    request = EstimateRequest(
        model=load_shape("qwen3-tiny", None), optimizers=names, momentum_dtypes=("float32", "int8"), stages=(0, 3)
    )
    rows = estimate_rows(request)
    console = Console(width=width, file=io.StringIO(), record=True)
    tables = list(to_tables(rows, width))
    for shown in tables:
        console.print(shown)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    per_row = [line for line in text.splitlines() if line.startswith("│ peak")]
    assert sum(line.count("│") - 2 for line in per_row) == len(rows)
    assert max(line.count("│") - 2 for line in per_row) >= (width - 26) // 16
    saved = [line for line in text.splitlines() if line.startswith("│ saved of peak")]
    assert sum(line.count("%") + line.count("—") for line in saved) == len(rows)
    assert tables[0].title == "ZeRO-0, 8 ranks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model qwen3-tiny --optimizers lionn", "unknown optimizer type 'lionn'"),
        ("--model qwen3-tiny --stages 4", "'4' is no whole number from 0 to 3"),
        ("--model qwen3-tiny --stages one", "--stages: 'one' is no whole number"),
        ("--model qwen3-tiny --ranks -8", "--ranks: '-8' is no whole number from 1"),
        ("--model qwen3-tiny --ranks 8 --nodes 1", "give --ranks or --nodes"),
        ("--model nowhere/config.json", "there is no model 'nowhere/config.json'"),
        ("--model qwen3-tinny", "did you mean 'qwen3-tiny'?"),
        ("--model qwen3-tiny --gpu-memory big", "'big' is no size of memory"),
        ("--model qwen3-tiny --momentum-dtype int4", "momentum_dtype is 'int4'"),
        ("--model qwen3-tiny --dtype half", "dtype is 'half'"),
        ("--params -3", "params is -3.0: write a number of parameters"),
        ("--params 1e6 --model qwen3-tiny", "one of the two"),
        ("--model qwen3-tiny --accumulation 0", "accumulation is 0"),
        ("--model qwen3-tiny --micro-batch 0", "micro-batch, seq-len and"),
        ("--model qwen3-tiny --liger-loss --loss-chunks 2", "liger-loss has pieces of its own"),
        ("--model qwen3-tiny --attention flash", "attention is 'flash'"),
        ('--model qwen3-tiny --optimizer-params {"lion":{"lrr":1}}', "lrr"),
        ("--model qwen3-tiny --config nowhere.json", "cannot read the config"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *arguments.split(" ")])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.full
def test_arithmetic_imports_no_deepspeed() -> None:
    program = (
        "import sys\n"
        "from ds_optim.memory import ZeroSettings, estimate, plan_optimizer, shape_of_count\n"
        "model = shape_of_count(1e6)\n"
        "estimate(model, plan_optimizer(model, 'lion_muon'), ZeroSettings(stage=3, ranks=8))\n"
        "assert not {'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_experts_that_a_json_deals_out_are_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "ds.json"
    for enabled, status in ((True, 2), (False, 0)):
        section = {"enabled": enabled, "autoep_size": 4}
        config.write_text(json.dumps({"train_batch_size": 8, "expert_parallel": section}), encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            main(["estimate", "--params", "1e6", "--stages", "2", "--config", str(config)])
        assert ended.value.code == status
        assert ("no stacks of experts" in capsys.readouterr().err) == enabled
