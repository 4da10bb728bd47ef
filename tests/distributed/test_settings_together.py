"""What ``ds-optim train --config`` makes of each setting of DeepSpeed, and of each two together.

Either one line refuses it before the first step, the same on every rank, or losses and gradients are those of the run
without it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from deepspeed.accelerator import get_accelerator

from docs.listings import complaint
from tests.pairs import PAIRED, PAIRS, Pair
from tests.settings import SETTINGS, Setting
from tests.tiers import cells

from . import nvme
from .commands import Command, Trained, answers, write_inputs
from .harness import RankError, run_ranks

_SAMPLE = (("autocast", "round robin"), ("bf16 masters", "offload"), ("clipping", "sub-groups"))
CELLS = cells([pair for pair in PAIRS if pair.names in _SAMPLE], PAIRS)
_IN_PAIRS = {name for name, _ in PAIRED.values()}
# Rows that no pair holds; sequences in parts are pairs, and state in files has a test of its own.
ALONE = cells(
    [],
    [
        (setting, stage)
        for setting in SETTINGS
        if setting.flags is not None
        and setting.name not in _IN_PAIRS
        and "sequence_parallel_size" not in setting.config
        for stage in setting.stages
        if not setting.losses.startswith(nvme.__name__) or complaint(setting, stage) is not None
    ],
)
NORMS = 20
"""By how much more than losses, in nats, norms of gradients may differ, as parts of them: by what was seen, doubled."""
Company = tuple[int, bool, bool]
"""Runs that may share processes: ranks, whether sequences are cut, and then whether batches are, whose shape DeepSpeed
keeps for the life of a process."""


def company_of(pair: Pair) -> Company:
    cut = "sequences cut" in pair.names and pair.refused is None
    return pair.ranks, cut, cut and "accumulation" in pair.names


def command_of(pair: Pair) -> Command:
    return Command(stage=pair.stage, config=pair.config, flags=pair.flags)


def command_alone(setting: Setting, stage: int) -> Command:
    return Command(stage=stage, config=setting.config, flags=setting.flags or {})


def plain_of(pair: Pair) -> Command:
    """The run without the two, of the same model and clipped as they are: two fp32 ranks at stage 2."""
    flags = {"model": pair.flags["model"]} if "model" in pair.flags else {}
    clip = {name: value for name, value in pair.config.items() if name == "gradient_clipping"}
    return Command(stage=2, config=clip, flags=flags)


PLAIN: Company = (2, False, False)


def run_in_folder(ranks: int, commands: list[Command]) -> list[list[Trained | str]]:
    """By rank what each came to."""
    with TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        return run_ranks(ranks, answers, Path(folder), commands, timeout=300)


def commands_of(company: Company) -> list[Command]:
    """What runs in it, what torch_autocast leaves behind last: fp16 finds bf16's, and nothing else may find either."""
    commands = [command_of(pair) for pair in CELLS if company_of(pair) == company]
    if company == PLAIN:
        plain = {repr(command): command for command in map(plain_of, CELLS)}
        commands += [*plain.values(), *(command_alone(*row) for row in ALONE)]
    elif company == SEQUENCES:
        commands += [WHOLE]
    return sorted(commands, key=lambda command: str(command.config.get("torch_autocast", "")))


SEQUENCES: Company = (2, True, False)
WHOLE = Command(stage=2)
"""A run of whole sequences, after those of cut ones."""


@cache
def outcomes(company: Company) -> list[tuple[Command, list[Trained | str]]] | RankError:
    """What the runs of a company came to on its ranks; what ended them is kept too, not to be run into once a test."""
    commands = commands_of(company)
    try:
        by_rank = run_in_folder(company[0], commands)
    except RankError as error:
        return error
    return [(command, [own[number] for own in by_rank]) for number, command in enumerate(commands)]


def outcome(company: Company, command: Command) -> Trained | str:
    """What a run came to, the same on every rank."""
    found = outcomes(company)
    if isinstance(found, RankError):
        raise found
    mine = next(answer for asked, answer in found if asked == command)
    assert all(own == mine[0] for own in mine), mine
    return mine[0]


def check_trained(found: Trained | str, plain: Trained | str, rounding: float) -> None:
    assert isinstance(found, Trained), found
    assert isinstance(plain, Trained), plain
    assert plain.losses[0] - plain.losses[-1] > 0.3, "a run that learns nothing shows nothing"
    assert found.losses == pytest.approx(plain.losses, abs=rounding)
    if found.norms[0] is not None:
        assert found.norms == pytest.approx(plain.norms, rel=NORMS * rounding)


@pytest.mark.parametrize("pair", CELLS, ids=lambda pair: f"{' + '.join(pair.names)} z{pair.stage}")
def test_two_settings_train_as_none_does_or_are_refused(pair: Pair) -> None:
    found = outcome(company_of(pair), command_of(pair))
    if pair.refused is None:
        check_trained(found, outcome(PLAIN, plain_of(pair)), pair.rounding)
    else:
        assert isinstance(found, str), found
        assert pair.refused in found
        assert "\n" not in found


@pytest.mark.full
def test_whole_sequences_are_refused_in_a_process_of_cut_ones() -> None:
    """DeepSpeed's attention stays in transformers' place, and would find another shape than its own."""
    found = outcome(SEQUENCES, WHOLE)
    assert isinstance(found, str)
    assert found.endswith("DeepSpeed cuts sequences of one shape and model in a process; start another one")


@pytest.mark.parametrize(("setting", "stage"), ALONE, ids=lambda value: getattr(value, "name", value))
def test_a_setting_of_no_pair_trains_as_none_does_or_is_refused(setting: Setting, stage: int) -> None:
    found, refused = outcome(PLAIN, command_alone(setting, stage)), complaint(setting, stage)
    if "fp16" in setting.config and not get_accelerator().is_fp16_supported():
        assert isinstance(found, str)
        assert found.startswith("this accelerator (cpu) has no fp16; use --dtype")
    elif refused is None:
        check_trained(found, outcome(PLAIN, Command(stage=2)), 2e-3 if setting.config else 1e-4)
    else:
        # DeepSpeed reads a config before its settings are looked at.
        assert isinstance(found, str)
        assert found == refused or found.startswith("DeepSpeed does not take this config: ")
        assert "\n" not in found


# ----------------------------------------------------------------------------------------- DeepSpeed's own AdamW

_ADAMW = {"type": "deepspeed:AdamW", "params": {"lr": 0.01, "torch_adam": True}}
_CUT = {"tensor_parallel": {"autotp_size": 2}}
_DEALT = {"model": "deepseek"}
_QUANTIZED, _SCATTERED = {"zero_quantized_gradients": True}, {"contiguous_gradients": False}
_EXPERTS = {
    "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "deepseek_v3", "use_grouped_mm": False}
}


def _of_adamw(ranks: int, *commands: Command) -> list[Trained]:
    found = run_in_folder(ranks, [replace(command, optimizer=_ADAMW) for command in commands])
    trained = [own for own in found[0] if isinstance(own, Trained)]
    assert len(trained) == len(commands), found[0]
    return trained


@pytest.mark.full
def test_deepspeeds_adamw_is_wrong_where_two_are_refused_for_it() -> None:
    """Else the lines that say so would be untrue."""
    whole, right, wrong = _of_adamw(
        2,
        Command(stage=1, flags=_DEALT),
        Command(stage=1, flags=_DEALT, config=_EXPERTS),
        Command(stage=1, flags=_DEALT, config={**_EXPERTS, "zero_optimization": _SCATTERED}),
    )
    assert right.norms == pytest.approx(whole.norms, rel=1e-3)
    assert wrong.norms[1:3] != pytest.approx(whole.norms[1:3], rel=1e-2)
    right, wrong, unmeasured = _of_adamw(
        4,
        Command(stage=3, config=_CUT),
        Command(stage=3, config={**_CUT, "zero_optimization": _QUANTIZED}),
        Command(stage=0, config={**_CUT, "bf16": {"enabled": True}}),
    )
    assert wrong.losses[-1] > right.losses[-1] + 0.3
    # Not refused: it is what DeepSpeed clips by, and nothing else. Before the first step all have the same weights.
    assert unmeasured.norms[0] < 0.97 * right.norms[0]
