"""Where ranks meet before they join: a store in which each of them signs, so that it is known who does not come."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_optim.errors import UserError

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What DeepSpeed and torch need of a launcher; without it DeepSpeed asks an MPI."""
_LOOK_S = 0.1
_WAIT = timedelta(seconds=1)


class Meeting:
    """The ranks of a job, and what each of them can tell the others with no collective.

    ``met`` is called once all have come. ``waits_for``: those that have not, as far as this rank knows.
    """

    def __init__(self, met: Callable[[Meeting], None] = lambda meeting: None) -> None:
        self.rank, self.world_size = 0, 1
        self.waits_for: list[int] = []
        self._met = met
        self._store: Any = None
        if launched():
            self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.waits_for = [0] if self.rank else list(range(1, self.world_size))

    def hold(self, timeout_s: float) -> None:
        """Wait until every rank has come, at the address that the launcher gave.

        Raises ``UserError`` where they do not in time, and torch's ``DistNetworkError`` where rank 0 goes.
        """
        if self.world_size > 1:
            self._store = self._open(timeout_s)
            self._store.set(f"here/{self.rank}", "")
            self._wait(timeout_s)
        self._met(self)

    def of_group(self) -> None:
        """All ranks have joined already."""
        self.rank, self.world_size, self.waits_for = dist.get_rank(), dist.get_world_size(), []
        if self.world_size > 1:
            self._store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        self._met(self)

    def post(self, name: str, value: str | None, wait_s: float) -> str:
        """What one rank posts under a name of its own, and the others wait for.

        Raises RuntimeError where it does not come, or the store is gone with the rank that serves it.
        """
        if self._store is None:
            return value or ""
        if value is not None:
            self._store.set(f"ds_optim/{name}", value)
            return value
        self._store.wait([f"ds_optim/{name}"], timedelta(seconds=wait_s))
        return str(self._store.get(f"ds_optim/{name}").decode())

    def late(self, limit_s: float) -> str:
        """One line on who did not come within ``limit_s``."""
        place = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '?')} on {socket.gethostname()}"
        missing = [rank for rank in self.waits_for if rank != self.rank]
        whom = f"rank {', '.join(map(str, missing))}" if missing else "the others"
        return f"{place} waited {limit_s:g} s for {whom} to join: see which of them did not start, or was lost"

    def _open(self, timeout_s: float) -> Any:
        # Torch's own rendezvous meets at the same address, and shares its server. Where torchrun started the ranks, it
        # serves the store, to all the starts that it makes.
        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world_size,
            is_master=self.rank == 0 and not elastic,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return dist.PrefixStore(f"ds_optim/start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _wait(self, limit_s: float) -> None:
        """Rank 0 looks who has signed; the others are told by it."""
        look = self._count if self.rank == 0 else self._hear
        deadline = time.monotonic() + limit_s
        while self.waits_for:
            look()
            if self.waits_for and time.monotonic() > deadline:
                raise UserError(self.late(limit_s))

    def _count(self) -> None:
        self.waits_for = [rank for rank in self.waits_for if not self._store.check([f"here/{rank}"])]
        self._store.set("waits for", json.dumps(self.waits_for))
        if self.waits_for:
            time.sleep(_LOOK_S)
        else:
            self._store.set("met", "")

    def _hear(self) -> None:
        try:
            self._store.wait(["met"], _WAIT)
            self.waits_for = []
        except dist.DistStoreError:  # not yet
            if self._store.check(["waits for"]):
                self.waits_for = json.loads(self._store.get("waits for")) or self.waits_for


def launched() -> bool:
    """Whether this process's launcher has told which rank it is, and where they meet."""
    given = [os.environ.get(name, "") for name in _LAUNCHED]
    return all(given) and given[0].isdecimal() and given[2].isdecimal()
