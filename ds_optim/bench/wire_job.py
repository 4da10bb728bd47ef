"""The process that ``wire`` starts in a network namespace of its own: ``python -m ds_optim.bench.wire_job FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from ds_optim.bench.wire import run_job

if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
