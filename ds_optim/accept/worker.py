"""The process of one part: ``python -m ds_optim.accept.worker PART FOLDER``. It leaves a row for each check.

FOLDER has ``settings.json``; a part that fails is a row too.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

SETTINGS, CHECKS = "settings.json", "checks.jsonl"


def main(name: str, folder: Path) -> None:
    """Run the part, each row written as soon as it is there."""
    from ds_optim.accept.checks import AcceptSettings, Check
    from ds_optim.accept.parts import PARTS
    from ds_optim.machine.child import reason_line
    from ds_optim.machine.plugins import load_plugins
    from ds_optim.report.schema import append_row

    settings = AcceptSettings.model_validate_json((folder / SETTINGS).read_bytes())
    try:
        load_plugins()
        for check in PARTS[name].run(settings, folder):
            append_row(folder / CHECKS, check.row(name))
    except Exception as problem:
        traceback.print_exc()
        append_row(folder / CHECKS, Check(name=f"all of {name}", ok=False, note=reason_line(problem)).row(name))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
