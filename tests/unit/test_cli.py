"""The command line: one line and status 2 for a user's mistake, and nothing heavy for help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import typer
from deepspeed.accelerator import get_accelerator

from ds_optim.bench.arguments import names
from ds_optim.cli.app import app, main, take_local_rank
from ds_optim.cli.failing import fail
from ds_optim.cli.train import print_result, train
from ds_optim.errors import UserError
from ds_optim.job.results import TrainResult
from ds_optim.job.settings import WITHOUT_FLAG, TrainSettings, make_settings, split_list
from ds_optim.machine import forked, ranks
from ds_optim.machine.said import is_first_to_say


def test_each_setting_is_a_flag_with_its_words() -> None:
    (command,) = [found for found in app.registered_commands if found.callback is train]
    flags = typer.main.get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None).params
    words = {flag.name: getattr(flag, "help", None) for flag in flags}
    fields = {name: field.description for name, field in TrainSettings.model_fields.items()}
    assert all(fields.values())
    assert all([words.pop(name) for name in ("config", "recipe", "dry_run", "tokens_per_s")])
    assert words == {name: text for name, text in fields.items() if name not in WITHOUT_FLAG}


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
        ("--lr inf", "lr is inf: write a finite number"),
        ("--clip nan", "clip is nan: write a finite number"),
        ("--time-limit-s inf", "time_limit_s is inf: write a finite number"),
        ("--hang-timeout inf", "hang_timeout is inf: write a finite number"),
        ("--seed 99999999999999999999", "seed is 99999999999999999999: write a number less than 9223372036854775808"),
        ("--tokenizer bpe:²²²", "unknown tokenizer 'bpe:²²²'"),
        ("--warmup 10 --steps 10", "warmup of 10 steps leaves nothing"),
        ("--tokenizer bpe:12", "unknown tokenizer"),
        ("--model x --preset qwen3-tiny", "a preset or a model, not both"),
        ("--resume", "resume needs out"),
        ("--zero-init --stage 2", "zero_init needs stage 3"),
        ("--optimizer-params {lr", "--optimizer-params is not JSON"),
        ("--optimizer-params 3", "takes a JSON object"),
        ('--lr 1 --optimizer-params {"lr":2}', "keep one"),
        ("--recipe lasm", "there is no recipe 'lasm' (did you mean 'lasm-134m'?)"),
        ("--recipe lasm-134m --config x.json", "give --recipe or --config, one of the two"),
        ("--dry-run --tokens-per-s 0", "--tokens-per-s is 0.0: write the tokens a second"),
        ("--tokens-per-s 5", "--tokens-per-s is for --dry-run"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("estimate --params 7e9 --gpu-memory 80", "'80' has no unit: write 80GiB or 80GB"),
        ("estimate --params 7e9 --gpu-memory 80gig", "'80gig' is no size of memory"),
        ("estimate --params 7e9 --gpu-memory 0GiB", "'0GiB' is no size of memory"),
        (f"estimate --params 7e9 --gpu-memory 1{'0' * 400}GiB", "is no size of memory"),
        ("simulate --params 7e9", "give --model (a preset, a config, a parameter list): a number"),
        ("simulate", "give --model"),
        ("compare --ranks 100000", "100000 ranks are too many for this machine's cores"),
        ("memory --ranks 100000", "100000 ranks are too many for this machine's cores"),
        ("bench wire --ranks 100000", "100000 ranks are too many for this machine's cores"),
        ("bench step --cases adamv", "--cases: unknown 'adamv'; did you mean 'AdamW'?"),
        ("estimate --params 1e30", "params is 1e+30: write a number of parameters up to 1e+12"),
        ("estimate --params nan", "params is nan: write a number of parameters"),
        ("estimate --params 7e9 --ranks 9999999999999", "'9999999999999' is no whole number from 1 to 100,000"),
        ("estimate --params 7e9 --stages 4", "--stages: '4' is no whole number from 0 to 3"),
        ('estimate --params 7e9 --optimizer-params {"lion":3}', "optimizer_params of 'lion' are no JSON object"),
        ("bench polar --seconds nan", "--seconds: nan is too few; write 0.001 or more"),
        ("bench step --rounds 0", "--rounds: 0 is too few; write 1 or more"),
        ("doctor --timeout nan", "--timeout is nan: write seconds"),
        ("doctor --timeout inf", "--timeout is inf: write seconds"),
        ("hostfile node[1-99999999999]:8", "a range of more than 100,000 nodes"),
        ("hostfile node1:99999999999", "'99999999999' is no number of ranks"),
        ("chaos --folder /nowhere", "--folder '/nowhere' is no folder that can be written to"),
        ("doctor --config /nope", "cannot read the config '/nope': no such file"),
    ],
)
def test_mistake_in_another_command_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failing_line(capsys, *arguments.split(" "))


def test_bench_takes_the_names_of_the_other_commands() -> None:
    known = ("AdamW", "deepspeed:Muon", "LionMuon", "SpectralLion-momentum")
    assert names("--cases", "adamw,lion_muon,DeepSpeed:muon,AdamW", known) == ["AdamW", "LionMuon", "deepspeed:Muon"]


@pytest.mark.parametrize("command", ["compare", "memory", "accept", "bench step", "bench wire"])
def test_more_ranks_than_gpus_are_a_line_before_anything_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    get_accelerator()  # it stays what it was at the first call
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(forked.forkserver, "ensure_running", started)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--ranks", "2", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    line = "--ranks: 2 ranks need as many GPUs and there are 1; write 1 or fewer, or set DS_ACCELERATOR=cpu"
    assert capsys.readouterr().err == f"ds-optim: error: {line}\n"


def test_a_benchmark_of_nothing_has_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["polar", "--shapes", "8x8"], ["elementwise", "--elements", "256"]):
        with pytest.raises(SystemExit) as caught:
            main(["bench", *arguments, "--device", "cuda"])
        assert caught.value.code == 1
        assert "not measured: this machine has no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_without_a_command_help_is_shown_and_nothing_else(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "Usage: ds-optim" in output.out
    assert output.err == ""


def test_version_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert not caught.value.code
    assert re.fullmatch(r"ds-optim \d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_run_with_nothing_left_to_do_prints_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    result = TrainResult(
        val_loss=2.0, unigram_entropy=3.0, ms_per_step=nan, tokens_per_s=nan, steps=9, parameters=10, losses=[],
        val_losses={9: 2.0}, skipped_steps=0, peak_memory_bytes=1,
    )  # fmt: skip
    print_result(result, make_settings())
    printed = capsys.readouterr().out
    assert "nan" not in printed.replace("nats", "")
    assert printed.count("no step was left to do") == 2


def test_ranks_of_a_node_say_a_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def said(rank: str | None, line: str) -> str:
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            fail(line)
        assert caught.value.code == 2
        return capsys.readouterr().err

    line = "ds-optim: error: one\n"
    assert [said(rank, "one") for rank in ("1", "0", "2", "1")] == [line, "", "", line]
    assert said("0", "another") == "ds-optim: error: another\n"
    assert said(None, "one") == line
    for path in tmp_path.iterdir():  # a minute later it is another run's
        os.utime(path, (0, 0))
    assert said("0", "one") == line
    assert len(list(tmp_path.iterdir())) == 1


def test_where_no_mark_can_be_left_every_rank_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert all(is_first_to_say("one", {"RANK": rank}) for rank in ("0", "1"))


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "4 ranks on .* need as many devices, and cuda has 2"),
        ({"LOCAL_RANK": "3", "LOCAL_SIZE": "4"}, "4 ranks on"),
        ({"LOCAL_RANK": "2"}, "3 ranks on .* start 2 or fewer on a node, or set DS_ACCELERATOR=cpu"),
        ({"LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, None),
    ],
)
def test_more_ranks_than_devices_are_one_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], line: str | None
) -> None:
    class Cuda:
        def device_name(self) -> str:
            return "cuda"

        def device_count(self) -> int:
            return 2

    for name in ("LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if line is None:
        ranks.check_device(Cuda())
        return
    with pytest.raises(UserError, match=line):
        ranks.check_device(Cuda())


def test_launchers_local_rank_is_taken_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "")  # so that what is set below goes with the test
    monkeypatch.delenv("LOCAL_RANK")
    assert take_local_rank(["--local_rank=3", "train", "--steps", "4"]) == ["train", "--steps", "4"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert take_local_rank(["train", "--local-rank", "1", "--steps", "4"]) == ["train", "--steps", "4"]
    # the launcher's environment says it first
    assert os.environ["LOCAL_RANK"] == "3"


def test_lists_are_split_at_commas() -> None:
    assert split_list("adamw, lion,,deepspeed:Muon") == ["adamw", "lion", "deepspeed:Muon"]


@pytest.mark.full
def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from ds_optim.cli.app import main\n"
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
