"""``ds-optim routes``: what it prints of models, and that what it says to write does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ds_optim.cli.app import main
from ds_optim.optimizers.route_rows import Route, change_of, rows_of_groups
from ds_optim.optimizers.routing import param_groups
from tests.unit.test_derived_views import Block
from tests.unit.zoo import config_of, model_of


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["routes", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def written(folder: Path, name: str) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config_of(name)))
    return str(path)


def test_a_table_of_kinds_with_counts_and_what_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = run(capsys, written(tmp_path, "MixtralForCausalLM"))
    assert status == 0
    (row,) = (line for line in said.splitlines() if "│ model.layers.*.mlp.experts.gate_up_proj" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "matrix",
        "model.layers.*.mlp.experts.gate_up_proj",
        "2",
        "16 x 14336x4096 (split, batch_dims)",
        "8 experts, gate and up apart",
        f"{2 * 8 * 28672 * 4096:,}",
    ]
    assert 'model.layers.*.mlp.experts.gate_up_proj: "matrix_exclude": ["experts\\\\.gate_up_proj$"]' in said
    assert 'lm_head.weight: "matrix_exclude_defaults": false' in said


def test_rows_as_json_follow_a_deepspeed_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "ds.json"
    params = {"lr": 1e-3, "heads": "auto", "matrix_exclude": ["dense_h_to_4h"]}
    config.write_text(json.dumps({"optimizer": {"type": "Muon", "params": params}}))
    model = written(tmp_path, "GPTNeoXForCausalLM")
    status, said, _ = run(capsys, model, "--config", str(config), "--json")
    assert status == 0
    rows = {row["names"]: row for row in json.loads(said[said.index("[") :])}
    fused = rows["gpt_neox.layers.*.attention.query_key_value.weight"]
    assert (fused["role"], fused["count"], fused["shape"]) == ("matrix", 2, [18432, 6144])
    assert (fused["seen"], fused["why"]) == ("192 x 96x6144 (split, interleave, heads)", "q, k and v apart, by head")
    assert rows["gpt_neox.layers.*.mlp.dense_h_to_4h.weight"]["why"] == "matrix_exclude 'dense_h_to_4h'"
    status, _, said = run(capsys, model, "--config", str(config), "--optimizer-params", "{}")
    assert (status, "give --config or --optimizer-params, one of the two" in said) == (2, True)


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "parameters.json"
    listed.write_text(json.dumps({"blocks.0.attn.qkv.weight": [24, 8], "lm_head.weight": [9, 8]}))
    status, said, _ = run(capsys, str(listed))
    assert status == 0
    assert "names and shapes and no modules" in said
    assert "fused in a way that is not known" in said
    assert '"views": [{"match": "qkv\\\\.weight$", "split": [8, 8, 8]}]' in said
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"model_type": "somebodys", "auto_map": {"AutoConfig": "code.Config"}}))
    status, _, said = run(capsys, str(own))
    assert (status, len(said.splitlines())) == (2, 1)
    assert "cannot load a model config" in said


def option_of(change: str) -> dict[str, Any]:
    """The first option of a change, as an argument of ``param_groups``."""
    found: dict[str, Any] = json.loads("{" + change.partition(", or")[0].partition(", for")[0] + "}")
    return found


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GptOssForCausalLM", "T5ForConditionalGeneration"])
def test_what_is_said_to_be_written_changes_that_kind_and_no_other(name: str) -> None:
    model = model_of(name)
    rows = rows_of_groups(param_groups(model))
    names = [one for row in rows for one in row.matched]
    for row in (row for row in rows if row.role == "matrix"):
        change = change_of(row, names)
        assert moved(model, rows, option_of(change)) == {row.names: "aux"}
        if ", or for one matrix " in change:
            whole = option_of(change.partition(", or for one matrix ")[2])
            assert moved(model, rows, whole) == {row.names: "x".join(map(str, row.shape))}


def moved(model: nn.Module, before: list[Route], options: dict[str, Any]) -> dict[str, str]:
    """By kind that ``options`` changed: its role, or what it is seen as where the role stayed."""
    old = {row.names: row for row in before}
    found = {}
    for row in rows_of_groups(param_groups(model, **options)):
        if row.role != old[row.names].role:
            found[row.names] = row.role
        elif row.seen != old[row.names].seen:
            found[row.names] = row.seen
    return found


def test_the_view_for_what_is_not_known_cuts_it() -> None:
    model = nn.Sequential(Block(), Block())
    rows = rows_of_groups(param_groups(model))
    names = [one for row in rows for one in row.matched]
    (qkv,) = (row for row in rows if row.names == "0.qkv.weight")
    change = change_of(qkv, names)
    assert change == '"views": [{"match": "^0\\\\.qkv\\\\.weight$", "split": [8, 8, 8]}]'
    assert moved(model, rows, option_of(change)) == {"0.qkv.weight": "3 x 8x8 (split)"}
