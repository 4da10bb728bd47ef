"""What fewer bits on the wire would cost and save: matrices and directions in int8, and weights as differences.

    python -m benchmarks.message_bits --out benchmarks/results/message_bits.jsonl

Matrices: momentum of a short run, and of a spectrum that falls as 1/k; the polar factor of what arrives against that of
what was sent, and its own rounding on the way back, both relative, beside the error of Newton-Schulz itself. Blocks of
128 values share a scale. Weights: bf16 weights of a run before and after a step, in units of their last place: how many
change, by how much, and the bits that a code of known frequencies needs for each, of the 16 that are gathered today.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.convergence.loop import make_optimizer
from benchmarks.convergence.study import Cell
from benchmarks.convergence.text import load_text
from ds_optim.data.batches import BatchShape, PackedBatches
from ds_optim.job.models import build_model, next_token_losses, preset_config
from ds_optim.matrix.polar import PolarSpec, polar
from ds_optim.optimizers.rules import MOMENTUM
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row

BLOCK = 128
RATES = {"AdamW": 1e-3, "Lion": 3e-4, "LionMuon": 3e-3, "Muon": 1e-2}


def int8(values: Tensor) -> Tensor:
    """Values as int8 with a scale for each block would bring them: rounded to nearest."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).flatten()[: flat.numel()].view_as(values)


def bf16(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """The distance of a from b, relative to b."""
    return float((a - b).norm() / b.norm())


def directions(momentum: Tensor) -> dict[str, float]:
    """Errors of a polar factor, each relative: of Newton-Schulz itself, of its products in bf16, of messages."""
    exact, coarse = PolarSpec(dtype="float32"), PolarSpec(dtype="bfloat16")
    u, _, v = torch.linalg.svd(momentum.double(), full_matrices=False)
    right = polar(momentum[None], exact)[0]
    found = {"newton_schulz": apart(right.double(), u @ v)}
    found["bf16 products"] = apart(polar(momentum.bfloat16()[None], coarse)[0].float(), right)
    for name, narrow in (("bf16", bf16), ("int8", int8)):
        found[f"{name} there"] = apart(polar(narrow(momentum)[None], exact)[0], right)
        found[f"{name} back"] = apart(narrow(right), right)
    return found


def falling(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values fall as 1/k."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, rows))[0] for n in (rows, columns))
    return left @ torch.diag(1.0 / torch.arange(1, rows + 1)) @ right.T


def ordinal(weights: Tensor) -> Tensor:
    """bf16 values as whole numbers in their order: neighbours differ by 1."""
    bits = weights.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def bits_of(differences: Tensor) -> dict[str, float]:
    """The share that changed, the largest change, and the entropy of the changes in bits an element."""
    count = Counter(differences.tolist())
    total = differences.numel()
    entropy = -sum(n / total * math.log2(n / total) for n in count.values())
    small = sum(n for change, n in count.items() if abs(change) <= 1) / total
    return {
        "changed": 1 - count[0] / total, "at_most_1": small, "largest": float(differences.abs().max()),
        "bits": entropy,
    }  # fmt: skip


def trained(name: str, steps: int, folder: Path) -> tuple[dict[str, float], Tensor]:
    """A run of qwen3-tiny, bf16 weights beside fp32 masters: its last step's changes, and a matrix's momentum."""
    text = load_text("shakespeare", "bytes", folder)
    model = build_model(preset_config("qwen3-tiny", text.vocab_size, 128), 0)
    params = {"lr": RATES[name]}
    cell = Cell(entry=name, model="", data="", horizon=0, optimizer=name, params=params, seed=0)
    optimizer = make_optimizer(model, cell)
    shape = BatchShape(seq_len=128, micro_batch=8, accumulation=1, rank=0, world_size=1)
    batches = PackedBatches(text.train, shape, 0)
    before = rounded(model)
    for step in range(steps):
        before = rounded(model)
        (windows,) = batches.step(step)
        next_token_losses(model, windows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wide = model.model.layers[0].mlp.up_proj.weight
    return bits_of(ordinal(rounded(model)) - ordinal(before)), optimizer.state[wide][MOMENTUM].float()


def rounded(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().bfloat16().flatten() for p in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    found: list[tuple[str, str, dict[str, float]]] = []
    matrices = {"1/k, 256x512": falling(256, 512)}
    with tempfile.TemporaryDirectory() as folder:
        for name in RATES:
            changes, momentum = trained(name, given.steps, Path(folder))
            found.append(("message_bits weights", name, changes))
            if name == "Muon":
                matrices["momentum of a run"] = momentum
    for name, matrix in matrices.items():
        found.append(("message_bits directions", name, directions(matrix)))
    for kind, name, values in found:
        print(f"{kind}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        if given.out is not None:
            append_row(given.out, Row(kind=kind, optimizer=name, extra={**values, **stamp}))


if __name__ == "__main__":
    main()
