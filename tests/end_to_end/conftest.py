"""What several end-to-end tests start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the model's config, in which ranks run: the path of a model is part of what a run is."""
    from .survival import FIRST_RELEASE  # not before --full is known: it imports tests, which ask for their tier

    shutil.copytree(FIRST_RELEASE / "model", tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One chromium for all tests of a file."""
    from tests.browser import chromium

    with chromium() as started:
        yield started
