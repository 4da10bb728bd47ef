"""Milliseconds of one optimizer step on a preset's shapes, each optimizer of the package against AdamW and Lion.

    python -m benchmarks.optimizer_cost --out benchmarks/results/optimizer_cost.jsonl

One process, nothing sharded, fp32 weights and random gradients of qwen3-134m; nothing is trained. Each case takes turns
with torch's fused AdamW and with Lion, so that whatever else the machine does meets all three alike, and its ratios are
to their medians over the same turns. A sample is the mean over a whole ``period`` of steps: LionMuon's are not alike.
Unsharded, the package's optimizers look for non-finite gradients themselves; under ZeRO, DeepSpeed does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ds_optim.job.models import preset_config
from ds_optim.job.presets import PRESETS
from ds_optim.memory.account import SCALAR_NUMEL
from ds_optim.optimizers import OPTIMIZERS, param_groups
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row

PRESET = "qwen3-134m"
REFERENCES = ("AdamW", "Lion")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LASM, element": ("LASM", {"variance": "element"}),
    "StoSignSGD, element": ("StoSignSGD", {"bound": "element"}),
    "CLion, tensor": ("CLion", {"gate": "tensor"}),
    "SpectralLion, weight": ("SpectralLion", {"basis": "weight"}),
    "LionMuon, period 5": ("LionMuon", {"period": 5, "lr": 3e-3, "sign_lr_ratio": 30}),
}
CASES = (*REFERENCES, *(name for name in OPTIMIZERS if name not in REFERENCES), *VARIANTS)


def build_model(layers: int, device: torch.device, seed: int = 0) -> torch.nn.Module:
    """The preset at another depth, with drawn weights and gradients; no layer of it is ever run."""
    from transformers import AutoModelForCausalLM

    preset = PRESETS[PRESET]
    config = preset_config(PRESET, preset.vocab_size or 0, preset.seq_len)
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=generator)
    return model


def build_optimizer(case: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Torch's AdamW, or one of the package's with its defaults, a variant's options excepted."""
    if case == "AdamW":
        return torch.optim.AdamW(model.parameters(), fused=True)
    name, options = VARIANTS.get(case, (case, {}))
    return OPTIMIZERS[name](param_groups(model), **options)


def sample(optimizer: torch.optim.Optimizer) -> float:
    """Milliseconds of a step, the mean over the period of an optimizer that has one."""
    steps = int(optimizer.param_groups[0].get("period", 1))
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3 / steps


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the buffers; step counts and numbers kept for a whole parameter left out."""
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in kept if tensor.numel() > SCALAR_NUMEL)


def measure(optimizers: dict[str, torch.optim.Optimizer], rounds: int) -> dict[str, list[float]]:
    """Samples of optimizers that take turns."""
    with contextlib.redirect_stdout(io.StringIO()):  # a first step makes state and prints what each parameter got
        for optimizer in optimizers.values():
            sample(optimizer)
    turns = [{name: sample(optimizer) for name, optimizer in optimizers.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in optimizers}


def rows(cases: list[str], layers: int, rounds: int, device: torch.device) -> Iterator[Row]:
    """A row for each case, as soon as it is measured."""
    model = build_model(layers, device)
    numel = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(len(group["params"]) for group in param_groups(model) if group["role"] == "matrix")
    shape = {"shape": PRESET, "layers": layers, "parameters": numel, "matrices": matrices}
    references = {name: build_optimizer(name, model) for name in REFERENCES}
    for case in cases:
        optimizer = references.get(case) or build_optimizer(case, model)
        gc.collect()  # the last case's state, before this one's
        times = measure({**references, case: optimizer}, rounds)
        median = {name: statistics.median(values) for name, values in times.items()}
        low, _, high = statistics.quantiles(times[case], n=4)
        yield Row(
            kind="optimizer_cost",
            optimizer=case,
            dtype="fp32",
            ms_per_step=round(median[case], 2),
            ms_low=round(low, 2),
            ms_high=round(high, 2),
            state_bytes_per_param=round(state_bytes(optimizer) / numel, 3),
            extra={
                "ratios": {f"optimizer / {name}": round(median[case] / median[name], 3) for name in REFERENCES},
                "references_ms": {name: round(median[name], 2) for name in REFERENCES},
                **shape,
                "rounds": rounds,
                "threads": torch.get_num_threads(),
                "machine": describe_machine(),
                "date": datetime.now(timezone.utc).date().isoformat(),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=";".join(CASES), help='separated by ";"')
    parser.add_argument("--layers", type=int, default=PRESETS[PRESET].shape["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=6, help="samples of each case, after one to warm up")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in rows(options.cases.split(";"), options.layers, options.rounds, device):
        print(
            f"{options.layers} layers {row.optimizer:22} {row.ms_per_step:9.1f} ms ({row.ms_low}-{row.ms_high}), "
            f"{row.state_bytes_per_param:.2f} B of state per parameter  {row.extra['ratios']}",
            flush=True,
        )
        if options.out:
            append_row(options.out, row)


if __name__ == "__main__":
    main()
