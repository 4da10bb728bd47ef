"""Whether this rank can join the others, told before it waits for them."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def unreachable(environment: Mapping[str, str], timeout_s: float) -> str | None:
    """Why this rank cannot reach rank 0, before it waits half an hour for it; None if it can or if this is rank 0.

    Where an MPI is to say who rank 0 is, it knows how to reach it.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if environment.get("RANK", "0") == "0" or address is None or port is None:
        return None
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, int(port)), timeout=max(0.1, min(5.0, timeout_s))):
                return None
        except socket.gaierror:
            return f"{address!r}, where rank 0 should be, is no known host: give its address, or add it to /etc/hosts"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            return (
                f"rank 0 at {address}:{port} cannot be reached ({reason}):"
                " see whether it has started, and whether a firewall or another interface is in between"
            )
        time.sleep(0.5)


@cache
def code_digest() -> str:
    """A hash of this package's source: names and contents of its files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".c") and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
