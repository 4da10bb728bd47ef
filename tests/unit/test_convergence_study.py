"""The convergence study: its cells and their order, runs that agree to the bit, resumption, and its statistics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.convergence import loop, page, run
from benchmarks.convergence import text as texts
from benchmarks.convergence.report import (
    interval,
    kin_table,
    ranking_table,
    seeds_table,
    sign_flip_p,
    tokens_to,
    write_report,
)
from benchmarks.convergence.study import Cell, Study, load_study
from benchmarks.convergence.text import Text, dictionary_entries, plain_html
from ds_optim.errors import UserError
from ds_optim.job.models import build_model
from tests.tiers import cells

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 32,
}  # fmt: skip
STUDY = Study.model_validate(
    {
        "models": {"m": {"shape": SHAPE, "tokenizer": "bytes", "seq_len": 8, "batch": 2, "body": 64}},
        "data": {"d": "shakespeare"},
        "entries": {
            "adamw": {"type": "AdamW", "lr": [1e-3, 2e-3, 4e-3], "axes": {"weight_decay": [0.3]}},
            "triple": {"type": "Lion", "like": "adamw", "lr_times": 3},
        },
        "blocks": [
            {"name": "r", "kind": "rates", "model": "m", "data": "d", "horizon": 2, "entries": ["adamw"]},
            {"name": "a", "kind": "axes", "model": "m", "data": "d", "horizon": 2, "entries": ["adamw"]},
            {"name": "s", "kind": "seeds", "model": "m", "data": "d", "horizon": 2, "seeds": [5, 6],
             "entries": ["adamw", "triple"]},
        ],
        "eval_batches": 1,
    }
)  # fmt: skip


def follow(losses: dict[float, float]) -> tuple[dict[str, float], list[Cell]]:
    """Every cell of the study, its loss by its learning rate."""
    done: dict[str, float] = {}
    order = []
    while due := STUDY.due(done):
        order.append(due[0])
        done[due[0].key] = losses.get(due[0].params["lr"], 9.0) - 0.1 * ("weight_decay" in due[0].params)
    return done, order


def test_a_best_at_an_edge_grows_the_grid_and_seeds_take_what_was_found() -> None:
    done, order = follow({1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.0, 8e-3: 1.5, 1.6e-2: math.inf})
    rates = [cell.params["lr"] for cell in order if cell.seed == 0 and "weight_decay" not in cell.params]
    assert rates == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    held = [(cell.entry, cell.seed, cell.params) for cell in order if cell.seed]
    tuned = {"lr": 8e-3, "weight_decay": 0.3}
    assert held == [
        ("adamw", 5, tuned), ("adamw", 6, tuned),
        ("triple", 5, {**tuned, "lr": 0.024}), ("triple", 6, {**tuned, "lr": 0.024}),
    ]  # fmt: skip
    assert STUDY.due(done) == []


@pytest.mark.parametrize(("low", "last"), [(2.0, 5e-4), (2.6, 4e-3)])
def test_it_grows_downward_too_and_not_where_the_best_is_inside(low: float, last: float) -> None:
    _, order = follow({1e-3: low, 2e-3: 2.5, 4e-3: 3.0})
    assert [cell.params["lr"] for cell in order if cell.seed == 0 and "weight_decay" not in cell.params][-1] == last


@pytest.fixture(scope="module")
def text() -> Text:
    ids = np.random.default_rng(0).integers(0, 50, 4000).astype(np.int32)
    return Text(ids, ids[:400], 50, "d")


def cell(optimizer: str, **params: object) -> Cell:
    return Cell(entry="e", model="m", data="d", horizon=4, optimizer=optimizer, params={"lr": 1e-3, **params}, seed=1)


@pytest.mark.parametrize("optimizer", cells(["LionMuon"], ["AdamW", "StoSignSGD", "deepspeed:Muon"]))
def test_two_runs_of_a_cell_agree_to_the_bit_and_so_does_a_resumed_one(
    optimizer: str, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(checkpoint: Path | None = None) -> list[list[float]]:
        curve = loop.run_cell(STUDY, cell(optimizer), text, torch.device("cpu"), checkpoint)["curve"]
        return [point[:3] for point in curve]

    whole = losses()
    assert len(whole) == 16
    assert losses() == whole
    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    saved, calls = loop._save, []

    def killed(*given: object) -> None:
        saved(*given)  # type: ignore[arg-type]
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        losses(tmp_path / "cell.pt")
    assert losses(tmp_path / "cell.pt") == whole


@pytest.mark.full
def test_a_compiled_cell_agrees_with_itself_to_the_bit_and_with_the_written_one_nearly(text: Text) -> None:
    for optimizer in ("LionMuon", "deepspeed:Muon"):  # the second one's own decorated functions stay as written
        whole = [
            [point[:3] for point in loop.run_cell(STUDY, cell(optimizer), text, torch.device("cpu"), None, c)["curve"]]
            for c in (False, True, True)
        ]
        assert whole[1] == whole[2]
        np.testing.assert_allclose(whole[1], whole[0], rtol=1e-3)


def test_rows_of_another_model_or_text_do_not_count_as_done() -> None:
    block, known = STUDY.blocks[0], {cell.key for cell in STUDY.due({})}
    other = STUDY.models[block.model].model_copy(update={"tokenizer": "bytes-of-another"})
    for change in (
        {"models": {**STUDY.models, block.model: other}},
        {"data": {**STUDY.data, block.data: "another"}},
        {"clip": 2 * STUDY.clip},
    ):
        assert not known & {cell.key for cell in STUDY.model_copy(update=change).wanted(block, {})}, change
    renamed = STUDY.model_copy(update={"evals": STUDY.evals + 1})
    assert {cell.key for cell in renamed.due({})} == known


def test_a_study_resumes_and_reports(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run.read_results(tmp_path, tmp_path)
    ran = 0
    while due := STUDY.due(run.losses(results)):
        results[due[0].key] = loop.run_cell(STUDY, due[0], text, torch.device("cpu"))
        ran += 1
    run.collect(results, tmp_path / "done" / "rows.jsonl")
    again = run.read_results(tmp_path / "new", tmp_path / "done")
    assert len(again) == ran
    assert STUDY.due(run.losses(again)) == []
    page = write_report(STUDY, again, tmp_path).read_text()
    assert "| triple | 2 |" in page
    assert (tmp_path / "plots" / "s-tokens.png").exists()


def test_sign_flips_and_intervals_are_exact() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    assert sign_flip_p([1.0, -1.0]) == 1
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 5.0, 1 - 2 / 32)
    low, high, coverage = interval([float(value) for value in range(8)])
    assert low > 0
    assert high < 7
    assert coverage >= 0.95


def test_an_entry_is_held_against_what_it_changes_and_ranks_are_as_open_as_the_seeds_leave_them() -> None:
    plain = {"type": "AdamW", "lr": [1e-3, 2e-3, 4e-3]}
    like = {"type": "Lion", "like": "near", "params": {"momentum_dtype": "bfloat16"}}
    block = {"model": "m", "data": "d", "horizon": 2}
    study = Study.model_validate(STUDY.model_dump() | {
        "entries": {"adamw": plain, "near": {**plain, "type": "Lion"}, "half": like,
                    "far": {**plain, "type": "Signum", "kin": "near"}},
        "blocks": [
            {"name": "r", "kind": "rates", "entries": ["adamw", "near", "far"], **block},
            {"name": "s", "kind": "seeds", "seeds": list(range(1, 7)), "entries": ["adamw", "near", "far"], **block},
            {"name": "q", "kind": "seeds", "seeds": list(range(1, 7)), "entries": ["half"], **block},
            {"name": "more", "kind": "seeds", "seeds": list(range(1, 9)), "entries": ["near"], **block},
        ],
    })  # fmt: skip
    away = {"adamw": 0.0, "near": 0.1, "far": 0.5, "half": -0.25}
    rows: dict[str, dict[str, Any]] = {}
    while due := study.due(run.losses(rows)):
        for one in due:
            sign = (-1) ** one.seed if one.entry == "near" else 1
            loss = one.seed + sign * away[one.entry] if one.seed else abs(math.log2(one.params["lr"] / 2e-3))
            rows[one.key] = {"val_loss": loss, "curve": [[50, 0, loss + 1, 0], [100, 0, loss, 0]], "tokens": 100}
    # seeds 1 to 6 of near are 0.1 below and above adamw in turn: no test tells them apart; far is worse with every seed
    assert ranking_table(study, "m", 2.0, rows).splitlines()[2:] == [
        "| 1 | adamw | 3.5000 | 1 to 2 |", "| 2 | near | 3.5000 | 1 to 2 |", "| 3 | far | 4.0000 | 3 to 3 |",
    ]  # fmt: skip
    table = seeds_table(study, study.blocks[1], rows).splitlines()
    assert table[-1] == "| far | 6 | 4.0000 | adamw | +0.5000 (+0.5000 to +0.5000, 97%) | 0.031 | 0 of 6 reach it |"
    (held,) = seeds_table(study, study.blocks[2], rows).splitlines()[2:]
    assert held.startswith("| half | 6 | 3.2500 | near | -0.2500 (-0.35")
    assert held.endswith("| 0.031 | 88% |")  # 50 of 100 tokens, and 0.65 or 0.85 of the way down the next 50
    assert kin_table(study, study.blocks[1], rows).splitlines()[2:] == [
        "| far | near | +0.5000 (+0.4000 to +0.6000, 97%) | 0.031 |"
    ]


def test_tokens_to_a_loss_are_read_between_validations() -> None:
    curve = [[100, 0, 4.0, 0], [200, 0, 3.0, 0]]
    assert tokens_to(curve, 3.5) == 150
    assert tokens_to(curve, 2.0) is None


def test_text_is_cut_into_documents_and_cleaned() -> None:
    entries = ["A \\A\\\n   one\n\n   two", "B\n   three"]
    assert dictionary_entries("\n" + "\n\n".join(entries) + "\n") == entries
    assert plain_html("<head><title>t</title></head><p>a <b>b</b></p>\n\n<p>c") == "a b\n\nc"


@pytest.mark.parametrize("name", ["study.yaml", "quick.yaml"])
def test_the_study_files_hold_and_every_optimizer_in_them_is_made(name: str) -> None:
    study = load_study(run.HERE / name)
    model = build_model(loop.model_config(next(iter(study.models.values())), 64), 0)
    for key, entry in study.entries.items():
        tuned = study.entries[entry.like] if entry.like else entry
        one = {axis: options[0] for axis, options in tuned.axes.items()}
        made = Cell(entry=key, model="m", data="d", horizon=1, optimizer=entry.type, seed=1,
                    params={"lr": tuned.lr[0], **one, **entry.params})  # fmt: skip
        loop.make_optimizer(model, made)
    assert study.due({})


def test_what_was_published_runs_as_it_stands() -> None:
    published = {"pair": {"type": "LionMuon", "params": {"period": 5}, "lr": [1e-3]}}
    data = STUDY.model_dump() | {"entries": published, "blocks": [
        {"name": kind, "kind": kind, "model": "m", "data": "d", "horizon": 2, "seeds": seeds, "entries": ["pair"]}
        for kind, seeds in (("rates", [0]), ("seeds", [3, 4]))
    ]}  # fmt: skip
    study = Study.model_validate(data)
    assert [(cell.seed, cell.params) for cell in study.due({})] == [(s, {"lr": 1e-3, "period": 5}) for s in (0, 3, 4)]
    assert study.due({cell.key: 1.0 for cell in study.due({})}) == []


def test_a_rate_is_looked_for_again_where_an_axis_has_moved_it() -> None:
    data = STUDY.model_dump()
    data["entries"]["adamw"]["axes"] = {"weight_decay": (0.3,), "lr": (0.5, 2.0)}
    study = Study.model_validate(data)
    done: dict[str, float] = {}
    order: list[Cell] = []
    while due := study.due(done):
        order.append(due[0])
        decayed = "weight_decay" in due[0].params
        away = abs(math.log2(due[0].params["lr"] / (1e-3 if decayed else 2e-3)))
        done[due[0].key] = away if decayed else 3 + away
    tried = [cell.params for cell in order if cell.entry == "adamw" and not cell.seed]
    assert tried[3:] == [{"lr": rate, "weight_decay": 0.3} for rate in (2e-3, 1e-3, 4e-3, 5e-4)]
    assert [c.params for c in order if c.entry == "adamw" and c.seed] == [{"lr": 1e-3, "weight_decay": 0.3}] * 2


def test_a_block_takes_what_another_tuned_and_looks_for_its_rate_alone() -> None:
    data = STUDY.model_dump()
    data["blocks"] = [*data["blocks"], *(
        {"name": "long " + kind, "kind": kind, "model": "m", "data": "d", "horizon": 8, "tuned_by": "s",
         "seeds": [0] if kind == "rates" else [7], "entries": ["adamw"]} for kind in ("rates", "seeds")
    )]  # fmt: skip
    study, done, order = Study.model_validate(data), {}, []
    while due := study.due(done):
        if due[0].horizon == 8:
            order.append(due[0])
            assert study.best(study.blocks[2], "adamw", done) == {"lr": 2e-3, "weight_decay": 0.3}
        best = 2e-3 if due[0].horizon == 2 else 8e-3
        done[due[0].key] = abs(math.log2(due[0].params["lr"] / best)) - 0.1 * ("weight_decay" in due[0].params)
    rates = [(c.params["lr"], c.params["weight_decay"], c.seed) for c in order]
    assert rates[:3] == [(1e-3, 0.3, 0), (2e-3, 0.3, 0), (4e-3, 0.3, 0)]
    assert rates[3:] == [(8e-3, 0.3, 0), (1.6e-2, 0.3, 0), (8e-3, 0.3, 7)]  # grown until the best is inside
    data["blocks"][-1]["tuned_by"] = "long rates"
    with pytest.raises(ValueError, match="long rates"):
        Study.model_validate(data)


def test_an_axis_grows_past_an_edge_too() -> None:
    data = STUDY.model_dump()
    data["entries"]["adamw"]["axes"] = {"weight_decay": (0.03, 0.3), "nesterov": (True, False), "ratio": (5, 20)}
    study, done, order = Study.model_validate(data), {}, []
    while due := study.due(done):
        order += [due[0].params] if due[0].entry == "adamw" and not due[0].seed else []
        decay, ratio = due[0].params.get("weight_decay", 0.1), due[0].params.get("ratio", 10)
        away = abs(math.log2(due[0].params["lr"] / 2e-3)), abs(math.log2(decay / 3)), abs(math.log2(ratio / 5.5))
        done[due[0].key] = sum(away) + 0.1 * due[0].params.get("nesterov", False)
        assert (study.best(study.blocks[2], "adamw", done) is None) == any(not cell.seed for cell in study.due(done))
    tried = [params["weight_decay"] for params in order if set(params) == {"lr", "weight_decay"}]
    assert tried[:4] == [0.03, 0.3, 0.95, 3.0]  # 0.95 is better than 0.3, 3.0 than 0.95, and 9.5 worse
    assert tried[4] == 9.5
    assert study.best(study.blocks[2], "adamw", done) == {"lr": 2e-3, "weight_decay": 3.0, "ratio": 5}
    assert {params["ratio"] for params in order if "ratio" in params} == {2, 5, 20}  # past 5 it is worse


def test_the_large_model_is_the_same_study_as_commands(tmp_path: Path) -> None:
    study = load_study(run.HERE / "study.yaml")
    large = [cell for cell in study.due({}) if cell.model == "134m"]
    assert len(large) == 24
    line = run.command(study, large[0])
    assert "--preset qwen3-134m --data hub:HuggingFaceFW/fineweb" in line
    assert "--steps 6481" in line


def test_a_worker_that_makes_the_text_meanwhile_takes_nobodys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, others = np.savez, list[Text]()

    def meanwhile(path: Path, **arrays: Any) -> None:
        write(path, **arrays)
        monkeypatch.setattr(np, "savez", write)
        monkeypatch.setattr(texts.os, "getpid", lambda: -1)
        others.append(texts.load_text("shakespeare", "bytes", tmp_path))

    monkeypatch.setattr(np, "savez", meanwhile)
    found = texts.load_text("shakespeare", "bytes", tmp_path)
    assert found.digest == others[0].digest


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("models: {}\ndata: {}\nentries: {a: {type: Lion}}\nblocks: []\n")
    with pytest.raises(UserError, match="entry 'a' has no lr to try"):
        load_study(path)
    path.write_text("models: {}\ndata: {}\nentries: {a: {type: Lion, lr: [1.0e-3], kin: b}}\nblocks: []\n")
    with pytest.raises(UserError, match="entry 'a' has kin 'b', which is no entry"):
        load_study(path)


def test_the_page_holds_what_the_committed_rows_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    study, rows = load_study(run.HERE / "study.yaml"), run.read_results(tmp_path)
    text = page.PAGE.read_text("utf-8")
    kinds = {match["kind"] for match in page.MARK.finditer(text)}
    assert kinds >= {"tuned", "seeds", "gaps", "curves"}
    assert page.filled(text, study, rows) == text, "write it again: python -m benchmarks.convergence --page"
    assert "Not run yet." in page.filled(text, study, {})
    for image in (tmp_path / "plots").glob("*.png"):
        assert (page.PAGE.parent / "images" / "plots" / image.name).exists(), image.name


def test_one_interval_far_out_does_not_squeeze_the_others_in_a_picture() -> None:
    near = {"a": (-0.02, -0.03, -0.01), "b": (0.01, -0.01, 0.03)}
    assert page.Gaps(name="n", title="t", of=near).right() == math.inf
    out = page.Gaps(name="n", title="t", of={**near, "c": (0.9, 0.8, 1.0)})
    assert out.right() == pytest.approx(1.3 * 0.03)
    (axes,) = out.figure({}, "black").axes
    assert axes.get_xlim()[1] == pytest.approx(1.3 * 0.03)
    assert [text.get_text().strip() for text in axes.texts] == ["+0.90"]
    below = {"a": (-0.9, -1.0, -0.8), "b": (-0.02, -0.03, -0.01)}
    assert page.Gaps(name="n", title="t", of=below).right() == math.inf
