"""The Python of the docs runs: each page's blocks in turn, on two ranks."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ds_optim
from tests.distributed.harness import device, run_ranks
from tests.distributed.models import TinyNet, batch, share

ROOT = Path(__file__).parents[2]
#: A block of Python, with the comment before it that says why it is not run.
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "docs/writing-a-rule.md": "tests/distributed/test_own_rule.py",
    "docs/trainers.md": "tests/end_to_end/test_trainers.py",
}
"""Pages whose Python another test runs."""
PAGES = ("docs/deepspeed-loop.md", "docs/checkpoints.md", "docs/groups.md", "configs/README.md")


class Net(TinyNet):
    """With what the snippets ask of a model of transformers."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def blocks_of(page: str) -> list[str]:
    return [block for reason, block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")) if not reason]


def batches(rank: int, world_size: int) -> list[Any]:
    return [[part.to(device()) for part in share(*batch(step, 8), rank, world_size)] for step in range(2)]


def train(engine: Any, data: list[Any]) -> list[float]:
    """Two steps; the losses of the second pass over the batches are others where weights moved."""
    losses = []
    for tokens, targets in data:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def run_page(rank: int, world_size: int, page: str) -> list[dict[str, Any]]:
    os.chdir(ROOT)
    data = batches(rank, world_size)
    model = Net().to(device())
    config: dict[str, Any] = {
        "optimizer": {"type": "LionMuon", "params": {"lr": 1e-3}},
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
    }
    names: dict[str, Any] = {"ds_optim": ds_optim, "json": json, "Path": Path, "batches": data}
    names["engine"], *_ = ds_optim.initialize(model=model, config=config)
    names["model"], names["parameter"] = model, model.square.weight
    train(names["engine"], data)
    found = []
    for block in blocks_of(page):
        if "initialize(" in block or "param_groups(model)" in block:
            names["model"] = Net().to(device())
        before = names["engine"]
        exec(compile("import deepspeed\n" + block, page, "exec"), names)
        losses = train(names["engine"], data) + train(names["engine"], data) if names["engine"] is not before else []
        optimizer = names.get("optimizer")
        rates = [group["lr"] for group in getattr(optimizer, "param_groups", [])]
        found.append({"losses": losses, "rates": rates, "momentum": names.get("momentum")})
    return found


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str) -> None:
    blocks = blocks_of(page)
    assert blocks
    first, second = run_ranks(2, run_page, page)
    assert len(first) == len(second) == len(blocks)
    for block, *ranks in zip(blocks, first, second, strict=True):
        for done in ranks:
            assert all(math.isfinite(loss) for loss in done["losses"])
            assert bool(done["losses"]) == ("initialize(" in block)
            if done["losses"]:
                assert done["losses"][0] != done["losses"][2], "the weights did not move"
    if "full_momentum" in "".join(blocks):
        assert first[-1]["momentum"].abs().max() > 0
        assert (first[-1]["momentum"] == second[-1]["momentum"]).all()
    if page == "docs/groups.md":
        assert 1e-5 in first[0]["rates"]


def test_every_page_with_python_is_run() -> None:
    """A page that is not run is one whose blocks all say why."""
    pages = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
    assert {page for page in pages if blocks_of(page)} <= set(PAGES) | set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")
