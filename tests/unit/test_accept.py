"""``ds-optim accept``: what its checks find, and that a part which ends badly costs the others nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from ds_optim.accept import given, kernels, measured, run, worker
from ds_optim.accept.checks import AcceptSettings, Check, nearest, page_rows, verdict, within
from ds_optim.accept.optimizers import Place, places
from ds_optim.accept.parts import MINUTES, PARTS
from ds_optim.cli.app import main
from ds_optim.elementwise import native
from ds_optim.errors import UserError
from ds_optim.report.schema import Row, read_rows
from tests.cases import CASES

QUICK = AcceptSettings(gpus=0, ranks=2, quick=True)


def test_parts_take_a_quarter_of_an_hour_and_are_those_that_the_help_names() -> None:
    assert MINUTES == 15
    for part in PARTS.values():
        part.run(QUICK, Path())  # there is such a function


def test_every_rule_is_a_subject() -> None:
    assert {subject.rule.name for subject in given.subjects()} == {case.rule.name for case in CASES.values()}


def test_given_gradients_are_those_of_the_loss_and_exact_as_means() -> None:
    model, wanted = given.new_model(), given.gradients(1, torch.device("cpu"))
    total = {name: torch.zeros_like(g) for name, g in wanted.items()}
    for rank in range(4):
        model.zero_grad()
        model({name: given.share_of(rank, 4) * g for name, g in wanted.items()}).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            total[name] += p.grad.bfloat16().float() / 4
    assert all(torch.equal(total[name], g) for name, g in wanted.items())


def test_every_kernel_holds_here() -> None:
    found = list(kernels.run(QUICK, Path()))
    assert len(found) > 100
    assert [check for check in found if not check.ok] == []


def test_a_kernel_that_is_off_by_a_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = native.blend_into

    def broken(out: torch.Tensor, *rest: object) -> bool:
        done = whole(out, *rest)  # type: ignore[arg-type]
        if done:
            out[-1:] = torch.nextafter(out[-1:], torch.full_like(out[-1:], float("inf")))
        return done

    monkeypatch.setattr(native, "blend_into", broken)
    found = list(islice(kernels.run(QUICK, Path()), 105))
    assert {check.name for check in found if not check.ok} == {"blend_into"}
    found = [check for check in found if not check.where.startswith("float16")]  # eager on a CPU
    assert {check.name for check in found if check.ok} == {"compiled steps", "sign_step", "apply_update", "adamw_step"}


def test_ranks_of_places() -> None:
    several = [Place(ranks=4, backend="nccl")]
    assert places(AcceptSettings(gpus=6, ranks=6)) == several, "means are exact over powers of two"
    assert places(AcceptSettings(gpus=0, ranks=3)) == [Place(ranks=2, backend="gloo")]
    alone, shared = places(AcceptSettings(gpus=1, ranks=1))
    assert (alone.ranks, alone.backend, shared.ranks, shared.backend, shared.one_device) == (1, "nccl", 2, "gloo", True)


def test_the_page_shows_what_is_nearest_to_its_limit_and_all_that_failed() -> None:
    checks = [within("a", 0.1, 1.0, where="x"), within("a", 0.9, 1.0, where="y"), Check(name="b", ok=True, note="none")]
    checks += [within("c", float("nan"), 1.0, where="z"), within("c", 2.0, 1.0), within("c", 0.0, 1.0)]
    a, b, c = page_rows([check.row("part") for check in checks])
    assert (a.extra["where"], a.extra["held"], a.extra["text"]) == ("y", "2 of 2", "0.900 (limit 1.00)")
    assert (b.status, b.extra["text"]) == ("ok", "")
    assert c.status == "failed"
    assert c.reason == "z, nan (limit 1.00), and 1 more of 3"
    rows = [check.row("part") for check in checks]
    assert verdict(rows) == "4 of 6 hold; not: part: c (1 of 3)."
    assert verdict(rows[:3]) == "3 of 3 hold: this machine is accepted."
    drawn = nearest(rows)
    assert drawn is not None
    assert drawn.groups == {"part": [("a", {"within its limit": 0.9})]}, "a NaN has no place on an axis"
    assert nearest(rows[2:3]) is None


def test_what_a_part_finds_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
        yield within("copy", 2.0, 1.0, where="here", unit="ms")
        raise RuntimeError("no memory is left")

    def in_process(name: str, settings: AcceptSettings, out: Path, limit_s: float) -> tuple[list[Row], float]:
        (tmp_path / name).mkdir()
        (tmp_path / name / worker.SETTINGS).write_text(settings.model_dump_json())
        worker.main(name, tmp_path / name)
        return read_rows(tmp_path / name / worker.CHECKS), limit_s

    monkeypatch.setattr(run, "_run_part", in_process)
    monkeypatch.setattr(measured, "polar", found)
    monkeypatch.setattr(measured, "wire", lambda settings, folder: iter([Check(name="Lion", ok=True)]))
    out = tmp_path / "out"
    assert run.accept(QUICK, ["polar", "wire"], out, minutes=30, force=False) == 1
    rows = read_rows(out / "results.jsonl")
    assert [(row.extra["part"], row.optimizer, row.reason) for row in rows] == [
        ("polar", "copy", "here, 2.00 ms (limit 1.00)"),
        ("polar", "all of polar", "RuntimeError: no memory is left"),
        ("wire", "Lion", None),
    ]
    page = (out / "report.md").read_text()
    for text in ("hold; not: ", "Part polar: 0 of 2 hold (120 s)", "- CPU: ", "- torch: ", "Left out: kernels"):
        assert text in page
    assert "failed: copy: here, 2.00 ms (limit 1.00)" in capsys.readouterr().err
    (tmp_path / "wire").rename(tmp_path / "before")
    assert run.accept(QUICK, ["wire"], tmp_path / "again", minutes=30, force=False) == 0
    with pytest.raises(UserError, match=r"holds results\.jsonl of an earlier run: add --force"):
        run.accept(QUICK, ["wire"], out, minutes=30, force=False)


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    rows, seconds = run._run_part("wire", QUICK, tmp_path, 0.2)
    assert [(row.optimizer, row.status) for row in rows] == [("all of wire", "failed")]
    assert "ended after 0 s" in (rows[0].reason or "")
    assert seconds < 10


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "kernel"], "--only: unknown 'kernel'; did you mean 'kernels'"),
        (["--ranks", "0"], "--ranks: 0 is too few; write 1 or more"),
        (["--minutes", "0"], "--minutes: 0 is too few"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["accept", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert line in capsys.readouterr().err.replace("\n", " ")
