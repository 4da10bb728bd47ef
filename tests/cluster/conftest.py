"""One cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("DS_OPTIM_CLUSTER") == "1":
        return
    skip = pytest.mark.skip(reason="minutes long: set DS_OPTIM_CLUSTER=1")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as made:
        made.start_slurm()
        yield made
