"""The core works where none of the extras' packages is installed, and a command that needs one names it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

EXTRAS = (
    *("transformers", "datasets", "tokenizers", "accelerate", "peft", "tensorboard", "pyarrow", "pandas", "mpi4py"),
    *("typer", "click", "rich", "matplotlib", "jinja2", "yaml"),
)
HIDE = """
import sys

EXTRAS = {hidden}

sys.modules |= dict.fromkeys(EXTRAS)  # to whom imports one of them, and to find_spec, it is not installed
"""
TRAIN = """
import deepspeed, torch, ds_optim
from ds_optim.cluster.doctor import DoctorSettings, examine
from ds_optim.zero.conversion import convert

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
params = {"lr": 0.01, "weight_decay": 0.1}
config = {"train_batch_size": 4, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
config = convert({**config, "optimizer": {"type": "AdamW", "params": params}}, "LionMuon").config
engine, optimizer, _, _ = ds_optim.initialize(model=model, config=config)
assert type(optimizer.optimizer) is ds_optim.LionMuon
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
losses = []
for step in range(3):
    loss = (engine(x) - x).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
engine.save_checkpoint("saved")
engine.load_checkpoint("saved")
ds_optim.from_config(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
assert [group["role"] for group in ds_optim.param_groups(model)] == ["matrix", "vector"]
from pathlib import Path
found = examine(DoctorSettings(config=None, out=Path("out"), timeout_s=60.0, trial=True))
assert [finding.line for finding in found.findings if not finding.fine] == []
assert "LionMuon stepped" in next(finding.line for finding in found.findings if finding.check == "trial")
here = sorted(EXTRAS & {name.partition(".")[0] for name, module in sys.modules.items() if module})
assert not here, here
print("trained")
"""


def python(code: str, folder: Path, hidden: Sequence[str] = EXTRAS) -> subprocess.CompletedProcess[str]:
    port = {"MASTER_PORT": str(20_000 + os.getpid() % 20_000), "MASTER_ADDR": "127.0.0.1"}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **port, **alone, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HIDE.format(hidden=set(hidden)) + code]
    # An op of DeepSpeed may have to be built first.
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_the_core_trains_saves_and_examines_without_any_extra(tmp_path: Path) -> None:
    done = python(TRAIN, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "trained"


@pytest.mark.full
@pytest.mark.parametrize(
    ("hidden", "arguments", "line"),
    [
        (
            ("typer",),
            ["doctor"],
            "the command line needs typer, which is not installed: pip install 'ds-optim[report]'",
        ),
        pytest.param(
            ("transformers",),
            ["estimate", "--model", "."],
            "transformers, which is not installed: pip install 'ds-optim[train]'",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("matplotlib",),
            ["estimate", "--params", "1e6", "--out", "o"],
            "pip install 'ds-optim[report]'",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_command_without_its_extra_names_it(
    hidden: tuple[str, ...], arguments: list[str], line: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = python(f"from ds_optim.cli import main\nmain({arguments!r})", tmp_path, hidden)
    assert done.returncode == 2, done.stderr[-3000:]
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
