"""Bytes between two nodes, as their interfaces count them, beside what the exchange plans."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from ds_optim.report import Row, describe_machine, write_rows
from tests.cluster.cluster import INTERFACE, Cluster
from tests.cluster.wire_job import SHAPE

pytestmark = pytest.mark.cluster


def test_interfaces_count_what_the_formula_says(cluster: Cluster, tmp_path: Path) -> None:
    job = str(Path(__file__).with_name("wire_job.py"))
    command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "node1:29519", job, INTERFACE]
    other = cluster.start(1, command, tmp_path)
    done = cluster.run(0, command, tmp_path, timeout=240)
    output, _ = other.communicate(timeout=60)
    assert done.returncode == other.returncode == 0, done.stdout + output
    # Whose node meets at the rendezvous first has rank 0.
    lines = [line for line in (done.stdout + output).splitlines() if line.startswith('{"case"')]
    rows = {(row["case"], row["stage"]): row for row in map(json.loads, lines)}
    assert len(rows) == 15
    for (case, stage), row in rows.items():
        beyond = row["sent"] - rows["AdamW", stage]["sent"]
        print(
            f"{case:12} stage {stage}: sent {row['sent']:11,.0f}  beyond AdamW {beyond:9,.0f}"
            f"  formula {row['formula']:9,.0f}"
        )
        # Headers, acknowledgements and the sums of rules with norms.
        slack = 0.02 * rows["AdamW", stage]["sent"] + 0.05 * row["formula"]
        assert beyond == pytest.approx(row["formula"], abs=slack), (case, stage)
    assert rows["Muon", 3]["formula"] > 0
    keep(rows)


def keep(rows: dict[tuple[str, int], dict[str, float]]) -> None:
    """Write what was counted into the file that DS_OPTIM_WIRE_RESULTS names, where it does."""
    place = os.environ.get("DS_OPTIM_WIRE_RESULTS")
    if place is None:
        return
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).date().isoformat(), "shape": str(SHAPE)}
    found = []
    for (case, stage), row in rows.items():
        beyond = row["sent"] - rows["AdamW", stage]["sent"]
        extra = {**stamp, "nodes": 2, "between_nodes_over_adamw": beyond, "formula": row["formula"]}
        fields = {"kind": "wire_bytes", "stage": stage, "ranks": 2, "dtype": "bf16"}
        found.append(Row(optimizer=case, wire_bytes_per_step=row["sent"], extra=extra, **fields))
    write_rows(Path(place), found)
