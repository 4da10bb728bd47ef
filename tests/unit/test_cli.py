"""The command line: one line and status 2 for a user's mistake, and nothing heavy for help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_optim.cli import main, take_local_rank
from ds_optim.train.settings import split_list


def failing_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that these arguments end with."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("ds-optim: error: ")
    return output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset qwen3-tinny", "did you mean 'qwen3-tiny'?"),
        ("--steps 0", "steps is 0: write a number greater than or equal to 1"),
        ("--steps many", "'--steps': Input should be a valid integer"),
        ("--stage 4", "stage"),
        ("--dtype float16", "dtype"),
        ("--lr -1", "lr is -1.0: write a number greater than or equal to 0"),
        ("--warmup 10 --steps 10", "warmup of 10 steps leaves nothing"),
        ("--tokenizer bpe:12", "unknown tokenizer"),
        ("--model x --preset qwen3-tiny", "a preset or a model, not both"),
        ("--resume", "resume needs out"),
        ("--zero-init --stage 2", "zero_init needs stage 3"),
        ("--optimizer-params {lr", "--optimizer-params is not JSON"),
        ("--optimizer-params 3", "takes a JSON object"),
        ('--lr 1 --optimizer-params {"lr":2}', "keep one"),
        ("--config nowhere.json", "cannot read the config 'nowhere.json'"),
        ("--optimiser lion", "--optimi"),
    ],
)
def test_mistake_in_train_is_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert message in failing_line(capsys, "train", *arguments.split(" "))


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "trian" in failing_line(capsys, "trian")


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({"optimizer": {"type": "Lion"}}, ["--optimizer", "muon"], "in --optimizer and in --config"),
        ({"optimizer": {"params": {}}}, [], 'needs a "type"'),
        ({"scheduler": {"type": "WarmupLR"}}, [], "has its own warmup"),
        ({"zero_optimization": {"stage": 7}}, [], "zero_optimization.stage is 7: write 0, 1, 2 or 3"),
        ({"zero_optimization": {"overlap_com": True}}, [], "(did you mean 'overlap_comm'?)"),
        ({"zero_optimization": "auto"}, ["--stage", "2"], "zero_optimization is 'auto': write an object"),
        ({"elasticity": {}}, [], "Elastic training has been removed"),
        ({"bf16": {"enabled": True, "loss_scale": 0}}, [], "there is no setting 'bf16.loss_scale'"),
        ({"train_batch_size": 7}, ["--micro-batch", "2"], "train_batch_size 7 is not micro_batch 2 x accumulation 3"),
        ({"optimizer": {"type": "Lion", "params": [1]}}, [], "write an object of parameters"),
    ],
)
def test_mistake_in_the_json_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: object, flags: list[str], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert message in failing_line(capsys, "train", "--config", str(path), *flags)


@pytest.mark.parametrize("command", ["compare", "memory"])
def test_mistake_in_what_else_the_json_of_cells_says_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    for said, message in (
        ('{"zero_optimization": {"overlap_com": true}}', "(did you mean 'overlap_comm'?)"),
        ('{"zero_optimization": 3}', "zero_optimization is 3: write an object of settings"),
        ('{"bf16": {}, "bf16": {}}', "--deepspeed has the key 'bf16' twice"),
    ):
        line = failing_line(capsys, command, "--out", str(tmp_path / "out"), "--deepspeed", said)
        assert message in line
    assert not (tmp_path / "out").exists(), "told before anything is run"


def test_json_with_a_missing_brace_names_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bf16":\n{"enabled": true}\n')
    assert "is not JSON" in failing_line(capsys, "train", "--config", str(path))


def test_launchers_local_rank_is_taken_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert take_local_rank(["--local_rank=3", "train", "--steps", "4"]) == ["train", "--steps", "4"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert take_local_rank(["train", "--local-rank", "1", "--steps", "4"]) == ["train", "--steps", "4"]
    # the launcher's environment says it first
    assert os.environ["LOCAL_RANK"] == "3"


def test_lists_are_split_at_commas() -> None:
    assert split_list("adamw, lion,,deepspeed:Muon") == ["adamw", "lion", "deepspeed:Muon"]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from ds_optim.cli import main\n"
        "try:\n    main(['train', '--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'deepspeed', 'transformers', 'datasets', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--optimizer-params" in done.stdout


def test_version_names_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["version"])
    assert not caught.value.code
    lines = dict(line.split(" ") for line in capsys.readouterr().out.splitlines())
    assert {"ds-optim", "torch", "deepspeed", "transformers", "datasets"} <= set(lines)
