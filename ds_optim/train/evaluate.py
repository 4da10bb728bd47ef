"""Validation: the mean loss over a fixed set of windows, the same for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ds_optim.data.batches import BatchShape, window_count, windows_at
from ds_optim.data.tokens import Ids
from ds_optim.machine import ranks
from ds_optim.train.sequences import Parts


def evaluation_windows(ids: Ids, seq_len: int, wanted: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most ``wanted`` window indices, evenly spread over the validation ids."""
    available = window_count(ids, seq_len)
    if wanted >= available:
        return np.arange(available, dtype=np.int64)
    return np.arange(wanted, dtype=np.int64) * available // wanted


def evaluate(engine: Any, ids: Ids, shape: BatchShape, batches: int, parts: Parts) -> float:
    """Mean loss in nats per token over ``batches`` global batches of validation windows. Collective."""
    indices = evaluation_windows(ids, shape.seq_len, batches * shape.global_batch)
    # Every rank runs the same number of forwards (at stage 3 each one is a collective), so the last round
    # repeats a window that does not count.
    per_round = shape.micro_batch * shape.world_size
    rounds = -(-indices.size // per_round)
    counted = np.arange(rounds * per_round) < indices.size
    indices = np.resize(indices, rounds * per_round).reshape(rounds, shape.world_size, shape.micro_batch)
    weights = counted.reshape(indices.shape)
    device = ranks.device()
    total = torch.zeros((), dtype=torch.float64, device=device)
    engine.eval()
    with torch.no_grad():
        for chosen, weight in zip(indices[:, shape.rank], weights[:, shape.rank], strict=True):
            windows = torch.from_numpy(windows_at(ids, shape.seq_len, chosen).astype(np.int64)).to(device)
            losses = parts.losses(engine, windows).double().view(shape.micro_batch, -1)
            total += (losses.sum(dim=1) * torch.from_numpy(weight.astype(np.float64)).to(device)).sum()
    engine.train()
    loss, count = ranks.sums([float(total), float(weights[:, shape.rank].sum() * shape.seq_len / parts.count)])
    return loss / count
