"""DeepSpeed's own tools on our checkpoints: ``ds_to_universal`` and ``load_universal``, and ``zero_to_fp32``."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.errors import UserError

from .harness import assert_all_raised, run_ranks
from .models import TinyNet
from .resharding import AFTER, BEFORE, KINDS, Seen, Shape, chosen, gathered, held, place, save_runs, steps
from .small_runs import Cell, bits, local_tensors, own_optimizer, start

pytestmark = pytest.mark.full

CARRIED: list[tuple[str, Shape, Shape]] = [
    ("LionMuon", (2, 1), (3, 2)),
    ("LionMuon", (2, 3), (3, 3)),
    ("bf16 momentum", (2, 2), (3, 1)),
    ("bf16 momentum", (2, 3), (1, 3)),
    ("aux adamw", (2, 3), (1, 3)),
    ("no buffer", (2, 1), (3, 1)),
    ("sub-groups", (2, 3), (3, 3)),
]
"""Within stages 1 and 2, and within stage 3."""
REFUSED = [
    ("int8 momentum", 1, "int8"),
    ("scalars", 3, "keeps for each parameter"),
    ("rows", 3, "keeps for each row of a matrix"),
]


def to_universal(folder: Path, tag: str) -> None:
    """What ``python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state`` does, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    made = folder / f"{tag}_universal"
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / tag),
            output_folder=str(made),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (folder / "latest_universal").write_text(made.name)


def universal(kind: str, stage: int) -> Cell:
    cell = KINDS[kind].cell(stage)
    return Cell(
        stage=stage, dtype=cell.dtype, zero=cell.zero, config={**cell.config, "checkpoint": {"load_universal": True}}
    )


def load_universal(kind: str, stage: int, world_size: int, folder: Path) -> Any:
    engine = start(universal(kind, stage), world_size, KINDS[kind].optimizer, TinyNet(seed=9))
    engine.load_checkpoint(str(folder))
    return engine


def load_all(rank: int, world_size: int, runs: list[tuple[str, int, Path]]) -> list[dict[str, Any]]:
    found = []
    for kind, stage, folder in runs:
        cell = universal(kind, stage)
        engine = load_universal(kind, stage, world_size, folder)
        optimizer = own_optimizer(engine)
        now = held(engine, cell, rank, world_size)
        steps(engine, range(BEFORE, BEFORE + 1), rank, world_size)
        states = [optimizer.state[t] for t in local_tensors(engine)]
        found.append(
            {
                "held": now,
                "groups": [
                    {k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups
                ],
                "shares": [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups],
                "steps": {state["step"] for state in states},
                "keys": sorted({key for s in states for key, value in s.items() if torch.is_tensor(value)}),
                "dtypes": sorted({str(s["exp_avg"].dtype) for s in states if "exp_avg" in s}),
                "loss": steps(engine, range(BEFORE + 1, BEFORE + AFTER), rank, world_size),
            }
        )
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[tuple[str, int], Seen]]]:
    """Checkpoints of 2 ranks, made universal, and what their ranks held."""
    folder = tmp_path_factory.mktemp("universal")
    runs = sorted({(kind, one[1]) for kind, one, _ in CARRIED} | {(kind, stage) for kind, stage, _ in REFUSED})
    every = run_ranks(2, save_runs, folder, runs, timeout=400)
    for kind, stage in runs:
        to_universal(folder / place(kind, (2, stage)), f"global_step{BEFORE}")
    return folder, every


@pytest.fixture(scope="module")
def loaded(
    saved: tuple[Path, list[dict[tuple[str, int], Seen]]],
) -> dict[tuple[str, Shape, Shape], list[dict[str, Any]]]:
    found = {}
    for ranks in sorted({other[0] for _, _, other in CARRIED}):
        own = [cell for cell in CARRIED if cell[2][0] == ranks]
        runs = [(kind, other[1], saved[0] / place(kind, one)) for kind, one, other in own]
        every = run_ranks(ranks, load_all, runs, timeout=400)
        found |= {cell: [rank[number] for rank in every] for number, cell in enumerate(own)}
    return found


@pytest.mark.parametrize(("kind", "one", "other"), CARRIED, ids=lambda value: str(value).replace(" ", ""))
def test_universal_checkpoints_carry_everything(
    kind: str,
    one: Shape,
    other: Shape,
    saved: tuple[Path, list[dict[tuple[str, int], Seen]]],
    loaded: dict[tuple[str, Shape, Shape], list[dict[str, Any]]],
) -> None:
    """Values arrive, each group has its own hyperparameters again, and nothing but the rule's buffers is kept."""
    before, after = [rank[kind, one[1]] for rank in saved[1]], loaded[kind, one, other]
    original, arrived = gathered(seen.held for seen in before), gathered(rank["held"] for rank in after)
    for key, values in original.items():
        assert torch.equal(bits(arrived[key].to(values.dtype)), bits(values)), key
        assert torch.equal(arrived[key].float(), values.float()), key
    for rank in after:
        assert rank["groups"] == [{k: v for k, v in g.items() if k != "lr"} for g in before[0].groups]
        assert rank["shares"] == pytest.approx([g["lr"] / before[0].groups[0]["lr"] for g in before[0].groups])
        assert rank["steps"] == {BEFORE + 1}
        assert rank["keys"] == before[0].counts["keys"]
        assert rank["dtypes"] == before[0].counts["dtypes"]
    means = [sum(losses) / len(losses) for losses in ([s.losses[-1] for s in before], [r["loss"][-1] for r in after])]
    assert means[1] == pytest.approx(means[0], abs=2e-3)


def step_universal(rank: int, world_size: int, kind: str, stage: int, folder: Path) -> None:
    engine = load_universal(kind, stage, world_size, folder)
    weights = [t.detach().clone() for t in local_tensors(engine)]
    try:
        steps(engine, [BEFORE], rank, world_size)
    except UserError:
        assert all(torch.equal(a, b) for a, b in zip(weights, local_tensors(engine), strict=True))
        raise


@pytest.mark.parametrize(("kind", "stage", "what"), REFUSED)
def test_what_a_universal_checkpoint_lacks_is_refused_before_a_step(
    kind: str, stage: int, what: str, saved: tuple[Path, list[dict[tuple[str, int], Seen]]]
) -> None:
    outcomes = run_ranks(2, step_universal, kind, stage, saved[0] / place(kind, (2, stage)), expect_error=True)
    assert_all_raised(outcomes, "UserError", what, "ds-optim reshard")


def load_of_another(rank: int, world_size: int, stage: int, folder: Path) -> None:
    """A universal checkpoint of DeepSpeed's AdamW under Lion."""
    cell = universal("LionMuon", stage)
    engine = start(cell, world_size, {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}})
    steps(engine, range(2), rank, world_size)
    engine.save_checkpoint(str(folder), tag="adamw")
    if rank == 0:
        to_universal(folder, "adamw")
    torch.distributed.barrier()
    engine = start(cell, world_size, chosen("Lion"))
    engine.load_checkpoint(str(folder))
    steps(engine, [2], rank, world_size)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_universal_state_of_another_optimizer_is_refused(stage: int, tmp_path: Path) -> None:
    outcomes = run_ranks(2, load_of_another, stage, tmp_path, expect_error=True)
    assert_all_raised(outcomes, "UserError", "ds-optim reshard")


def test_a_placeholder_is_one_value_in_the_file(saved: tuple[Path, list[dict[tuple[str, int], Seen]]]) -> None:
    """And stands only where the rule has no such buffer."""
    for kind, stage, wrapper in (("LionMuon", 1, "base_optimizer_state"), ("LionMuon", 3, "optimizer_state_dict")):
        folder = saved[0] / place(kind, (2, stage)) / f"global_step{BEFORE}"
        path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        state = torch.load(path, weights_only=False)["optimizer_state_dict"][wrapper]["state"]
        for own in state.values():
            assert own["exp_avg_sq"].shape == own["exp_avg"].shape
            assert own["exp_avg_sq"].untyped_storage().nbytes() == 4
            assert own["exp_avg"].untyped_storage().nbytes() == 4 * own["exp_avg"].numel()


RECOVERED = [("LionMuon", 1), ("bf16 momentum", 2), ("LionMuon", 3), ("sub-groups", 3)]


@pytest.mark.parametrize(("kind", "stage"), RECOVERED)
def test_zero_to_fp32_gives_the_live_weights(
    kind: str, stage: int, saved: tuple[Path, list[dict[tuple[str, int], Seen]]]
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    runs = [rank[kind, stage] for rank in saved[1] if (kind, stage) in rank]
    folder = saved[0] / place(kind, (2, stage))
    recovered = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=f"global_step{BEFORE}")
    live = {name: values for (name, what), values in gathered(s.held for s in runs).items() if what == "master"}
    assert recovered.keys() == live.keys()
    for name, values in live.items():
        assert torch.equal(bits(copy.copy(recovered[name])), bits(values)), name
