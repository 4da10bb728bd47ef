"""The examples: in each trainer the JSON's optimizer steps, the losses are the plain loop's, and resume is exact."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import assert_all_raised, run_ranks
from tests.tiers import cells

ROOT = Path(__file__).parents[2]
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SAVED = {"trainer": "checkpoint-3", "lora": "checkpoint-3", "sft": "checkpoint-3", "accelerated": "3"}
"""By example, where it leaves the state after three of its six steps."""
NEEDS = {"trainer": "accelerate", "lora": "peft", "sft": "trl", "accelerated": "accelerate"}

Found = dict[str, dict[str, tuple[list[float], str]]]
"""By example and run ("plain", "whole", "resumed"), the losses and the class of the optimizer."""


def config(stage: int, zero: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "examples" / "ds.json").read_text(encoding="utf-8"))
    return {**loaded, "zero_optimization": {"stage": stage, **(zero or {})}, **others}


def fresh() -> None:
    """Forget the Accelerator of an earlier training in this process."""
    import deepspeed
    from accelerate.state import AcceleratorState

    deepspeed.logger.setLevel("ERROR")
    AcceleratorState._reset_state(reset_partial_state=True)


def run_examples(rank: int, world_size: int, folder: Path, names: list[str], stage: int, zero: Any) -> Found:
    from examples import plain

    found: Found = {}
    settings = config(stage, zero)
    for name in names:
        fresh()
        example = importlib.import_module(f"examples.{name}")
        out = folder / name
        model = example.model() if name == "lora" else None
        runs = {"plain": plain.main(settings, model), "whole": example.main(settings, str(out))}
        fresh()
        found[name] = {**runs, "resumed": example.main(settings, str(out), f"{out}/{SAVED[name]}")}
    return found


def check(found: Found) -> None:
    for name, runs in found.items():
        plain, whole, resumed = (runs[run][0] for run in ("plain", "whole", "resumed"))
        assert [stepped for _, stepped in runs.values()] == ["LionMuon"] * 3, name
        assert len(plain) == 6
        # TRL's model call brings positions along, whose attention rounds otherwise.
        assert whole == (pytest.approx(plain, rel=2e-5) if name == "sft" else plain), name
        assert resumed == whole[3:], name


def test_the_trainer_by_its_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for found in run_ranks(2, run_examples, tmp_path, ["trainer"], 2, None, timeout=300):
        check(found)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "zero"), cells([], [(1, OFFLOAD), (2, None), (3, OFFLOAD)], [(3, None), (2, OFFLOAD)])
)
def test_every_example_trains_as_the_plain_loop(tmp_path: Path, stage: int, zero: Any) -> None:
    names = ["trainer", "accelerated"] if stage == 1 else list(SAVED)
    for package in NEEDS.values():
        pytest.importorskip(package)
    for found in run_ranks(2, run_examples, tmp_path, names, stage, zero, timeout=600):
        assert list(found) == names
        check(found)


# --------------------------------------------------------------------------------------------------- Lightning


def cpus_for_cuda() -> Any:
    """Lightning's strategy asks for its accelerator of CUDA devices by class; this one's are the CPU."""
    import torch
    from lightning.pytorch.accelerators.cuda import CUDAAccelerator

    class Cpus(CUDAAccelerator):
        def setup_device(self, device: torch.device) -> None:
            pass

        def setup(self, trainer: Any) -> None:
            pass

        def teardown(self) -> None:
            pass

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return list(range(devices))

        @staticmethod
        def get_parallel_devices(devices: Any) -> Any:
            return [torch.device("cpu", number) for number in devices]

        @staticmethod
        def is_available() -> bool:
            return True

    return Cpus()


def run_lightning(rank: int, world_size: int, folder: Path, stage: int, zero: Any) -> Found:
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    from examples import lit, plain

    def trained(resume: str | None = None) -> tuple[list[float], str]:
        given = {"accelerator": cpus_for_cuda(), "plugins": [TorchElasticEnvironment()], "enable_progress_bar": False}
        return lit.main(config(stage, zero), str(folder), resume, **given)

    return {
        "lit": {
            "plain": plain.main(config(stage, zero)),
            "whole": trained(),
            "resumed": trained(f"{folder}/step=3.ckpt"),
        }
    }


@pytest.mark.full
@pytest.mark.parametrize(("stage", "zero"), [(2, None), (3, OFFLOAD)])
def test_lightnings_strategy_trains_as_the_plain_loop(tmp_path: Path, stage: int, zero: Any) -> None:
    pytest.importorskip("lightning")
    for found in run_ranks(2, run_lightning, tmp_path, stage, zero, timeout=300):
        check(found)


def test_examples_are_short() -> None:
    examples = [path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in examples} > set(SAVED) | {"plain"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in examples)


# -------------------------------------------------------------------------- "auto", schedules, accumulation, refusals

AUTO = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto"}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
FILLED = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 3}


def auto(stage: int, **others: Any) -> dict[str, Any]:
    """The JSON that a user of Trainer or Accelerate has, with nothing in it that their arguments say."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimizer = {"type": "LionMuon", "params": AUTO}
    return config(stage, OFFLOAD, optimizer=optimizer, **dict.fromkeys(sizes, "auto"), **others)


def arguments(folder: Path, settings: Any, **others: Any) -> Any:
    from transformers import TrainingArguments

    fixed = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    quiet = {"logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    sampling = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "warmup_steps": 3}
    return TrainingArguments(output_dir=str(folder), deepspeed=settings, **{**fixed, **quiet, **sampling, **others})


def logged(folder: Path, settings: Any, resume: str | None = None, **others: Any) -> list[dict[str, float]]:
    from examples import small
    from examples.trainer import MyTrainer

    fresh()
    trainer = MyTrainer(
        model=small.model(), args=arguments(folder, settings, **others), train_dataset=small.data().repeat(2)
    )
    trainer.train(resume_from_checkpoint=resume)
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def by_accelerate(settings: Any) -> list[float]:
    """The losses with two micro-steps a step, and Accelerate's own "auto"."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DummyScheduler

    import ds_optim.hf
    from examples import small

    fresh()
    PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config=settings, gradient_accumulation_steps=2)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
    model = small.model()
    optimizer = ds_optim.hf.optimizer(accelerator, model, lr=1e-2, weight_decay=0.1)
    schedule = DummyScheduler(optimizer, warmup_num_steps=3)
    loader: Any = small.torch.utils.data.DataLoader(small.data().repeat(2).with_format("torch"), batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses, parts = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            parts.append(float(accelerator.reduce(loss.detach(), "mean")))
        if len(parts) == 2:
            losses.append(sum(parts) / 2)
            parts = []
    return losses[:6]


def autos(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    import ds_optim
    from examples import small

    fresh()
    settings = auto(2, scheduler=WARMUP)
    found: dict[str, Any] = {"warmup": logged(folder / "warmup", settings), "accelerate": by_accelerate(settings)}
    cosine = {"settings": auto(3, bf16={"enabled": "auto"}), "lr_scheduler_type": "cosine", "bf16": True}
    found["cosine"] = logged(folder / "cosine", **cosine)
    found["cosine resumed"] = logged(folder / "cosine", resume=f"{folder}/cosine/checkpoint-3", **cosine)
    scheduler = {"type": "WarmupLR", "params": FILLED}
    plain = config(2, OFFLOAD, scheduler=scheduler, gradient_accumulation_steps=2)
    engine, *_ = ds_optim.initialize(model=small.model(), config=plain)
    losses = []
    for number, batch in enumerate(small.torch.utils.data.DataLoader(small.data().repeat(2).with_format("torch"), 2)):
        if number % world_size == rank:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            small.torch.distributed.all_reduce(mean := loss.detach().clone())
            losses.append(float(mean) / world_size)
    found["plain"] = [sum(losses[i : i + 2]) / 2 for i in range(0, 12, 2)]
    return found


@pytest.mark.full
def test_auto_schedules_and_accumulation_are_as_written_out(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for found in run_ranks(2, autos, tmp_path, timeout=400):
        assert found["accelerate"] == pytest.approx(found["plain"], rel=2e-5)
        assert [logs["loss"] for logs in found["warmup"]] == pytest.approx(found["plain"], rel=2e-5)
        cosine = found["cosine"]
        assert [logs["learning_rate"] for logs in cosine][:4] == pytest.approx([0.0, 1e-2 / 3, 2e-2 / 3, 1e-2])
        for logs in cosine:
            rates = [logs[f"{group}/lr"] for group in ("matrix", "aux", "vector")]
            assert rates == pytest.approx([logs["learning_rate"] * part for part in (1, 0.1, 0.1)])
        assert found["cosine resumed"][3:] == cosine[3:], "to the bit"


def refused(rank: int, world_size: int, folder: Path, case: str) -> None:
    from torch.optim import SGD
    from transformers import Trainer

    import ds_optim.hf
    from examples import small
    from examples.trainer import MyTrainer

    fresh()
    settings = arguments(folder, auto(2))
    if case == "twice":
        MyTrainer(model=small.model(), args=settings, train_dataset=small.data(), optimizer_cls_and_kwargs=(SGD, {}))
    if case == "misspelt":
        wrong = auto(2) | {"optimizer": {"type": "LionMuon", "params": {**AUTO, "perod": 2}}}
        MyTrainer(model=small.model(), args=arguments(folder, wrong), train_dataset=small.data()).train()
    if case == "other":
        adamw = auto(2) | {"optimizer": {"type": "AdamW", "params": {**AUTO, "torch_adam": True}}}
        settings = arguments(folder, {**adamw, "zero_optimization": {"stage": 2}})
        callback = ds_optim.hf.OptimizerCallback()
        Trainer(model=small.model(), args=settings, train_dataset=small.data(), callbacks=[callback]).train()


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        ("twice", "UserError", "an optimizer is given in code and in the config ('LionMuon')"),
        ("misspelt", "UserError", "did you mean 'period'"),
        ("other", "RuntimeError", "AdamW steps, which is none of ds_optim's optimizers"),
    ],
)
def test_what_would_step_something_else_is_refused_on_every_rank(
    tmp_path: Path, case: str, error: str, said: str
) -> None:
    pytest.importorskip("accelerate")
    outcomes = run_ranks(2, refused, tmp_path, case, timeout=200, expect_error=True)
    assert_all_raised(outcomes, error, said)


def run_page(rank: int, world_size: int, folder: Path, settings: Any) -> list[str]:
    """The classes that step in the blocks of docs/trainers.md."""
    from accelerate import PartialState

    import ds_optim.hf
    from examples import small
    from tests.distributed.test_docs_snippets import blocks_of

    stepped = []
    for block in blocks_of("docs/trainers.md"):
        fresh()
        names: dict[str, Any] = {"model": small.model(), "dataset": small.data(), "loader": small.batches()}
        if "Trainer" in block:
            names["arguments"] = arguments(folder, settings)
        else:
            PartialState(cpu=True)
            names["config"] = settings
        exec(compile(block, "docs/trainers.md", "exec"), names)
        optimizer = names["trainer"].optimizer if "trainer" in names else names["optimizer"]
        stepped.append(type(ds_optim.hf.stepping(optimizer)).__name__)
    return stepped


@pytest.mark.full
def test_the_python_and_json_of_the_page_run(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    text = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    settings = json.loads(text.partition("```json\n")[2].partition("```")[0])
    for stepped in run_ranks(2, run_page, tmp_path, settings, timeout=200):
        assert stepped == ["LionMuon", "LionMuon"]
