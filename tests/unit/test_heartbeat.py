"""A rank whose rank 0 is lost between meeting and the first sign of life learns it soon."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ds_optim.machine.meeting import Meeting
from ds_optim.survival import heartbeat


class OfOneThatIsGone(Meeting):
    """Of two ranks that have met; rank 0 said where it serves, and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world_size, self.waits_for = 1, 2, []

    def post(self, name: str, value: str | None, wait_s: float) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])


@pytest.mark.full
def test_who_meets_a_store_that_is_gone_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    # torch tries for about twice as long, with pauses by chance
    monkeypatch.setattr(heartbeat, "_CONNECT_TIMEOUT", timedelta(seconds=2))
    began = time.monotonic()
    with pytest.raises(dist.DistError):
        heartbeat.Heartbeat(0.5, OfOneThatIsGone())
    assert time.monotonic() - began < 25
