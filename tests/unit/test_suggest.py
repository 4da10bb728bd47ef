"""``ds-optim suggest``: which candidate is taken by what fits, and the JSON that comes out."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ds_optim.cli import main
from ds_optim.errors import UserError
from ds_optim.memory.estimate_fit import USABLE
from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.suggest import CANDIDATES, Suggestion, suggest
from ds_optim.report.suggest import sentences
from ds_optim.zero.conversion import convert
from tests.unit.test_cli import failing_line

ADAMW: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
}


@cache
def model() -> ModelShape:
    return load_shape("qwen3-tiny", None)


def found(room: float | None = None, **changes: Any) -> Suggestion:
    size = None if room is None else int(room / USABLE) + 1
    return suggest({**ADAMW, **changes}, model(), ranks=4, gpu_bytes=size)


def peaks(dtype: str) -> dict[str, int]:
    """Of every optimizer with that momentum; found by asking for what only it fits in."""
    for room in (None, *(2.0**power for power in range(36, 20, -1))):
        some = found(room)
        if some.momentum_dtype == dtype:
            return {row.estimate.optimizer.name: row.peak for row in some.rows}
    raise AssertionError(f"nothing is suggested with {dtype}")


def test_the_first_that_fits_with_the_widest_momentum_is_taken() -> None:
    wide = peaks("float32")
    assert wide["LionMuon"] < wide["adamw"]
    told = found(wide["LionMuon"])
    assert (told.optimizer, told.momentum_dtype) == ("LionMuon", "float32")
    assert "AdamW does not" in " ".join(sentences(told))
    narrow = found(min(peak for name, peak in wide.items() if name != "adamw") - 8)
    assert narrow.momentum_dtype == "bfloat16"
    assert narrow.converted.config["optimizer"]["params"]["momentum_dtype"] == "bfloat16"


def test_without_a_size_it_is_the_first() -> None:
    told = found()
    assert told.optimizer == next(iter(CANDIDATES))
    assert "fits" not in " ".join(sentences(told))


def test_where_none_fits_it_is_the_smallest_and_what_helps_is_said() -> None:
    told = found(2.0**20)
    assert told.chosen.peak == min(row.peak for row in told.rows)
    assert told.momentum_dtype == "int8"
    said = " ".join(sentences(told))
    for way in ("does not fit", "smaller micro-batch", "--checkpointing", "raise the stage from 2", "offload"):
        assert way in said


def test_a_lower_stage_that_is_enough_is_named() -> None:
    told = found(2.0**36, zero_optimization={"stage": 3})
    assert [own.estimate.zero.stage for _, own in told.lower] == [1, 2]
    assert "It fits at ZeRO-1 as well" in " ".join(sentences(told))
    assert found(2.0**36, zero_optimization={"stage": 1}).lower == ()


def test_the_json_says_what_no_flag_does() -> None:
    request = found().chosen.request
    assert (request.micro_batch, request.zero.accumulation, request.zero.dtype) == (2, 4, "bf16")
    assert found(bf16={"enabled": False}).chosen.request.zero.dtype == "fp32"
    assert found(bf16={"enabled": False}, fp16={"enabled": True}).chosen.request.zero.dtype == "fp16"
    assert found(bf16={"enabled": "auto"}).chosen.request.zero.dtype == "bf16"
    assert suggest(ADAMW, model(), ranks=4, micro_batch=7).chosen.request.micro_batch == 7
    offloaded = found(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    assert offloaded.chosen.estimate.zero.offload


def test_flags_of_estimate_change_what_is_suggested_from() -> None:
    def held(**flags: Any) -> int:
        return suggest(ADAMW, model(), ranks=4, **flags).chosen.passes.most

    assert max(held(loss_chunks=8), held(liger_loss=True)) < held() < held(attention="eager")
    section = {"partition_activations": True, "cpu_checkpointing": True, "profile": True}
    said = [line for line in sentences(found(activation_checkpointing=section)) if "deepspeed.checkpointing" in line]
    assert len(said) == 1
    for key, named in (("partition_activations", True), ("cpu_checkpointing", True), ("profile", False)):
        assert (f"activation_checkpointing.{key}" in said[0]) == named
    assert not any("activation_checkpointing" in line for line in sentences(found()))


def test_docs_begin_with_the_same_three_at_the_rates_that_a_json_gets() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"^\| `(\w+)` \| .*AdamW's \|", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    text = (root / "docs" / "from-adamw.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (1e-\d)[^|]* \| ([\d.]+) \|", text, re.MULTILINE)
    assert named == [name for name, *_ in rows] == list(CANDIDATES)
    for name, lr, decay in rows:
        params = convert(ADAMW, name).config["optimizer"]["params"]
        assert (params["lr"], params["weight_decay"]) == (float(lr), float(decay))


def test_what_is_open_is_asked_for() -> None:
    with pytest.raises(UserError, match='stage is "auto" in --from: write 0, 1, 2 or 3'):
        found(zero_optimization={"stage": "auto"})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "ds.json", tmp_path / "new.json"
    source.write_text(json.dumps(ADAMW), encoding="utf-8")
    asked = ["suggest", "--from", str(source), "--model", "qwen3-tiny", "--ranks", "4"]

    def printed(*flags: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*asked, *flags])
        assert ended.value.code == 0
        return tuple(capsys.readouterr())

    written, said = printed()
    assert json.loads(written)["optimizer"]["type"] == "LionMuon"
    assert said.startswith("LionMuon, at ZeRO-2 on 4 ranks.")
    said, _ = printed("--gpu-memory", "80GiB", "--out", str(out))
    assert "It fits in the 72.0 GiB" in said
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(written)
    assert "'80' has no unit" in failing_line(capsys, *asked, "--gpu-memory", "80")
