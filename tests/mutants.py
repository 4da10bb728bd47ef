"""Faults made by hand, to show that the tests find them.

    python -m tests.mutants [--full] [--only WORD] [--jsonl FILE]

Each is put into a copy of the tree, one at a time, and the tests that ought to find it are run there. What the default
tier does not find is run again with ``--full``. A mutant that no test finds, or whose text is no longer in the
sources exactly once, ends this with a status other than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240.0
"""Tests that take so long say nothing of the mutant."""


@dataclass(frozen=True)
class Mutant:
    """In the one file called ``file`` that has ``old`` in it, ``new`` stands in its place; ``tests`` of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def place(self, root: Path) -> Path:
        """Files move, texts stay: the place is known by both."""
        found = [path for path in sorted((root / "ds_optim").rglob(self.file)) if self.old in path.read_text("utf-8")]
        if len(found) != 1 or found[0].read_text("utf-8").count(self.old) != 1:
            raise LookupError(f"{self.name}: {self.old!r} does not stand once in one {self.file}: bring it up to date")
        return found[0]


U, D, E = "tests/unit/test_", "tests/distributed/test_", "tests/end_to_end/test_"

MUTANTS = [
    # ------------------------------------------------------------------------------------------------ layout
    Mutant(
        "the last slice of stage 3 keeps its padding",
        "layout.py",
        "held = min(shard, numel - first)",
        "held = shard",
        f"{U}layout.py",
    ),
    Mutant(
        "partitions of stages 1 and 2 are aligned by ranks alone",
        "layout.py",
        "alignment = 2 * self.world_size",
        "alignment = self.world_size",
        f"{U}layout.py {D}plan.py",
    ),
    Mutant(
        "a slice reaches beyond its partition",
        "layout.py",
        "right = min(start + numel, (rank + 1) * self.partition_numel)",
        "right = start + numel",
        f"{U}layout.py",
    ),
    Mutant(
        "the last holder of a cut parameter is forgotten",
        "layout.py",
        "(start + self.params[param].numel - 1) // size + 1)",
        "(start + self.params[param].numel - 1) // size)",
        f"{U}layout.py",
    ),
    Mutant(
        "a sub-group closes one parameter too late",
        "layout.py",
        "if held >= sub_group_size:",
        "if held > sub_group_size:",
        f"{U}layout.py {D}plan.py",
    ),
    Mutant(
        "aligned parameters start at the wrong element",
        "layout.py",
        "position += -position % self.param_alignment",
        "position += position % self.param_alignment",
        f"{U}layout.py",
    ),
    Mutant(
        "matrices take turns in the other direction",
        "lion_muon.py",
        "(step - phase) % int(period)",
        "(step + phase) % int(period)",
        f"{U}spread.py",
    ),
    Mutant(
        "the cheapest matrices are dealt to turns first",
        "phases.py",
        "key=lambda place: -_work(members[place])",
        "key=lambda place: _work(members[place])",
        f"{U}spread.py",
    ),
    # -------------------------------------------------------------------------------------- owners and exchange
    Mutant(
        "the smallest matrices are dealt first",
        "owners.py",
        "key=lambda j: (-costs[j], j)",
        "key=lambda j: (costs[j], j)",
        f"{U}exchange_plan.py {U}exchange_property.py",
    ),
    Mutant(
        "a run is one job too long",
        "owners.py",
        "held + sizes[job] > bound",
        "held > bound",
        f"{U}exchange_plan.py {U}exchange_property.py",
    ),
    Mutant(
        "unlike matrices are stacked",
        "owners.py",
        "if not runs or kinds[runs[-1][0]] != kinds[job] or ",
        "if not runs or ",
        f"{U}exchange_plan.py {U}exchange_property.py {U}matrix_work.py",
    ),
    Mutant(
        "ranks work on what smaller teams share first",
        "shares.py",
        "return -self._size(param), -self.costs[param]",
        "return self._size(param), -self.costs[param]",
        f"{U}shares.py",
    ),
    Mutant(
        "a share's slice is taken for the parameter's first elements",
        "sharing.py",
        "start=first + held.start",
        "start=held.start",
        f"{D}sharing.py",
    ),
    Mutant(
        "an owner sends its own slices to itself",
        "plan.py",
        "0 if owner == rank else sum(self.held(param, rank, part) for param in params)",
        "sum(self.held(param, rank, part) for param in params)",
        f"{U}exchange_plan.py {U}exchange_property.py",
    ),
    Mutant(
        "an owner waits for its own counts from others",
        "plan.py",
        "sum(self.held(param, source, part) for param in bucket.owned[rank])",
        "sum(self.held(param, rank, part) for param in bucket.owned[rank])",
        f"{U}exchange_plan.py {U}exchange_property.py",
    ),
    Mutant(
        "buckets of the longest queue are dropped",
        "plan.py",
        "for k in range(max(map(len, queues)))",
        "for k in range(min(map(len, queues)))",
        f"{U}exchange_plan.py {U}exchange_property.py",
    ),
    Mutant(
        "whole matrices do not count when owners are chosen",
        "plan.py",
        "loads = [sum(self.costs[p] for p in params) for params in self._whole]",
        "loads = [0.0 for params in self._whole]",
        f"{U}exchange_plan.py {U}exchange_property.py {D}plan.py",
    ),
    Mutant(
        "the digest of a plan leaves its buckets out",
        "plan.py",
        "self.whole, self.buckets, self.shape.name, self.polar",
        "self.whole, self.shape.name, self.polar",
        f"{U}exchange_plan.py {U}costs.py {D}plan.py",
    ),
    Mutant(
        "messages go to their owners in the wrong order",
        "exchange.py",
        "others = [peer for peer in range(plan.unit.world_size) if peer != rank]",
        "others = [peer for peer in reversed(range(plan.unit.world_size)) if peer != rank]",
        f"{D}exchange.py {U}exchange_property.py",
    ),
    Mutant(
        "an owner does not apply results to its own slices",
        "exchange.py",
        "returns.give(back.in_stacks, results)",
        "pass",
        f"{U}exchange_property.py {D}exchange.py",
    ),
    Mutant(
        "slices that go together have blocks of int8 momentum that are another's",
        "lines.py",
        "held.offset, at, block, stream",
        "held.offset, at, 0, stream",
        f"{D}at_once.py",
    ),
    Mutant(
        "slices that go together have no scale",
        "at_once.py",
        "lines.table(scale=update.scale, scale_of=scale_of)",
        "lines.table()",
        f"{D}at_once.py",
    ),
    Mutant(
        "absent parameters are worked on",
        "exchange.py",
        "[held.param for held in batch[0].slices if held.param not in absent]",
        "[held.param for held in batch[0].slices]",
        f"{U}unstepped.py {U}exchange_property.py {U}optimizers.py",
    ),
    # ------------------------------------------------------------------------------------------------ sums, comm
    Mutant(
        "sums over parameters are not joined over ranks",
        "sums.py",
        "return comm.all_reduce(rows, op)",
        "return rows",
        f"{D}sums.py",
    ),
    Mutant(
        "a minimum starts at zero",
        "sums.py",
        '"min": float("inf")',
        '"min": 0.0',
        f"{D}sums.py",
    ),
    Mutant(
        "a maximum is summed over ranks",
        "comm.py",
        '"max": dist.ReduceOp.MAX',
        '"max": dist.ReduceOp.SUM',
        f"{D}sums.py",
    ),
    Mutant(
        "what a rank sends to itself is counted",
        "comm.py",
        "(sum(counts) - counts[self.rank])",
        "sum(counts)",
        f"{D}exchange.py {D}state_and_bytes.py",
    ),
    Mutant(
        "sums of slices are not rounded to what all borders agree on",
        "sums.py",
        "round(mantissa * 2**24)",
        "(mantissa * 2**24)",
        f"{D}sums.py",
    ),
    # ------------------------------------------------------------------------------------------------ rules
    Mutant(
        "Lion's betas are swapped",
        "updates.py",
        "return Blend((b1, 1 - b1), (b2, 1 - b2))",
        "return Blend((b2, 1 - b2), (b1, 1 - b1))",
        f"{U}optimizers.py",
    ),
    Mutant(
        "nesterov looks ahead from the old mean",
        "muon.py",
        "Blend((mu * mu, 1 - mu * mu), blend.momentum)",
        "Blend((mu, 1 - mu * mu), blend.momentum)",
        f"{U}optimizers.py",
    ),
    Mutant(
        "CautiousLion does not scale its step up",
        "cautious_lion.py",
        "scale=chosen.value,",
        "scale=1.0,",
        f"{U}optimizers.py",
    ),
    Mutant(
        "CLion's gate does not open at its threshold",
        "clion.py",
        'float(least[0] >= group["nu"])',
        'float(least[0] > group["nu"])',
        f"{U}family_options.py {U}family_identities.py {U}optimizers.py",
    ),
    Mutant(
        "a message has room for its first slice alone",
        "lines.py",
        "sum(lies[-1]) if lies",
        "sum(lies[0]) if lies",
        f"{U}exchange_property.py",
    ),
    Mutant(
        "experts are exchanged among all ranks",
        "binding.py",
        "return self.experts.get(unit, self.comm)",
        "return self.comm",
        f"{D}experts.py",
    ),
    Mutant(
        "the ranks of a tensor group take each other's shards",
        "shards.py",
        "if (first + row) % ranks == rank]",
        "if row % ranks == rank]",
        f"{D}tensor_parallel.py {U}shards.py",
    ),
    Mutant(
        "a shard that is not finite is known to its rank alone",
        "steps.py",
        'return bool(peers.all_reduce(flag, "min") > 0)',
        "return own",
        f"{D}tensor_parallel.py",
    ),
    Mutant(
        "parameters that a rank has nothing of count as zero",
        "sums.py",
        "torch.full((), _IDENTITY[op], dtype=torch.float64, device=home)",
        "torch.zeros((), dtype=torch.float64, device=home)",
        f"{D}sums.py",
    ),
    Mutant(
        "the host waits for every gradient by itself",
        "steps.py",
        "flags[device].append(torch.isfinite(torch.stack(_extremes(tensors, device))).all())",
        "flags[device].append(torch.tensor(all([bool(torch.isfinite(t).all()) for t in tensors]), device=device))",
        f"{U}cuda_dry_run.py",
    ),
    Mutant(
        "LASM sums where it averages",
        "lasm.py",
        "(1 - b2) * sums[0] / spec.whole_numel",
        "(1 - b2) * sums[0]",
        f"{U}optimizers.py",
    ),
    Mutant(
        "LASM has one scale for all layers",
        "lasm.py",
        'blend=Blend(weights, weights),\n            lr=chosen.lr,\n            decay=group["weight_decay"],\n'
        '            scale=layer_scale(group["layer_scales"], piece.spec.name),',
        'blend=Blend(weights, weights),\n            lr=chosen.lr,\n            decay=group["weight_decay"],\n'
        "            scale=1.0,",
        f"{U}layer_scales.py {U}optimizers.py",
    ),
    Mutant(
        "Lamb's norm of weights is not bounded",
        "lamb.py",
        "min(theta, LARGEST_NORM) / r",
        "theta / r",
        f"{U}optimizers.py {U}family_identities.py {U}family_options.py",
    ),
    Mutant(
        "StableAdamW speeds up, too",
        "stable_adamw.py",
        'group["lr"] / max(1.0, rms)',
        'group["lr"] / rms',
        f"{U}optimizers.py",
    ),
    Mutant(
        "StableLion's trust ratio is not bounded",
        "stable_lion.py",
        "value=min(ratio, most), shown",
        "value=ratio, shown",
        f"{U}optimizers.py",
    ),
    Mutant(
        "StoSignSGD forgets the largest momentum",
        "sto_sign_sgd.py",
        "bound = max(bound, largest[0])",
        "bound = largest[0]",
        f"{U}optimizers.py {U}sto_sign_sgd.py",
    ),
    Mutant(
        "noise starts anew in each slice",
        "sto_sign_sgd.py",
        "start=piece.start)",
        "start=0)",
        f"{D}same_gradients.py",
    ),
    Mutant(
        "LionMuon is spectral one step late",
        "lion_muon.py",
        "return (step - phase) % int(period) == 0",
        "return (step - phase + 1) % int(period) == 0",
        f"{U}optimizers.py",
    ),
    Mutant(
        "LionMuon's signs step at the matrices' rate",
        "lion_muon.py",
        'lr=group["lr"] / group["sign_lr_ratio"], decay',
        'lr=group["lr"], decay',
        f"{U}optimizers.py",
    ),
    Mutant(
        "the random period draws the same at each step",
        "lion_muon.py",
        "stream=_PERIOD_STREAM, step=step)",
        "stream=_PERIOD_STREAM, step=0)",
        f"{U}random_period.py {U}optimizers.py",
    ),
    Mutant(
        "MiMuon's gate asks for the sum of its matrices' norms",
        "matrix_steps.py",
        "math.sqrt(total / count)",
        "math.sqrt(total)",
        f"{U}several_matrices.py",
    ),
    Mutant(
        "MiMuon's raw steps ignore their rate",
        "mimuon.py",
        'lr=group["lr"] * group["raw_scale"])',
        'lr=group["lr"])',
        f"{U}optimizers.py {U}family_options.py",
    ),
    Mutant(
        "scales are of the transposed matrix",
        "updates.py",
        "math.sqrt(max(1.0, m / n))",
        "math.sqrt(max(1.0, n / m))",
        f"{U}optimizers.py",
    ),
    Mutant(
        "the aux rule AdamW has its betas swapped",
        "elements.py",
        "betas=update.betas",
        "betas=update.betas[::-1]",
        f"{U}optimizers.py",
    ),
    # ------------------------------------------------------------------------------------------------ some rows
    Mutant(
        "of equal rows the last ones are chosen",
        "selection.py",
        "group.sort(dim=-1, descending=True, stable=True).indices",
        "group.flip(-1).sort(dim=-1, descending=True, stable=True).indices.mul(-1).add(group.shape[-1] - 1)",
        f"{U}selection.py",
    ),
    Mutant(
        "the ranks choose by what each holds of a row",
        "selection.py",
        "exchange.comm.all_reduce(joined[: sums.travelling])",
        "pass",
        f"{D}same_gradients.py",
    ),
    Mutant(
        "a run of chosen rows forgets what a border leaves of one",
        "selection.py",
        "(first - none) * columns + column * (last - first)",
        "(first - none) * columns",
        f"{U}selection.py",
    ),
    Mutant(
        "rows that are stepped keep their momentum",
        "row_steps.py",
        "change.fill_(1.0).index_fill_(0, numbers, update.kept)",
        "change.fill_(1.0)",
        f"{U}selection.py {U}optimizers.py",
    ),
    Mutant(
        "some rows step by a scale of their own",
        "matrices.py",
        "_, rows, columns = (view.of or view).matrices()[0]",
        "_, rows, columns = view.matrices()[0]",
        f"{U}selection.py",
    ),
    Mutant(
        "a plan of some rows counts the work of all",
        "plan.py",
        "if self.fraction == 1.0:",
        "if True:",
        f"{U}selection.py",
    ),
    Mutant(
        "interleaved queries, keys and values count as split ones",
        "qk_rows.py",
        "    if interleaved:  # a key",
        "    if False:  # a key",
        f"{U}qk_rows.py",
    ),
    Mutant(
        "biases of queries and keys stay",
        "qk_rows.py",
        "            if bias in members:",
        "            if bias in ():",
        f"{U}qk_rows.py",
    ),
    Mutant(
        "cautious decay of a step of zero is an update",
        "diagnostics.py",
        "was - was * (lr * local.cautious_decay) if local.cautious_decay else was",
        "was",
        f"{U}diagnostics.py",
    ),
    Mutant(
        "SignMuon names another argument than its own",
        "lion_muon.py",
        'beta = check_beta("beta", beta)',
        "pass",
        f"{U}family_options.py",
    ),
    # ------------------------------------------------------------------------------------------------ one step
    Mutant(
        "heads that take turns are cut as if they lay in a row",
        "layouts.py",
        "key_heads=widths.heads, turns=widths.heads or 0)",
        "key_heads=widths.heads)",
        f"{U}derived_views.py",
    ),
    Mutant(
        "gates and ups that take turns are cut in halves",
        "derived.py",
        'joined is False or family == "gpt_oss"',
        "False",
        f"{U}derived_views.py",
    ),
    Mutant(
        "rows are chosen of a whole turn, whatever heads lie in it",
        "views.py",
        "max(1, heads // self.interleave)",
        "1",
        f"{U}selection.py",
    ),
    Mutant(
        "matrices do not decay",
        "matrix_steps.py",
        '"decay": update.decay, "scale": scale_by',
        '"decay": 0.0, "scale": scale_by',
        f"{U}optimizers.py",
    ),
    Mutant(
        "matrices step without their scale",
        "matrix_steps.py",
        '"scale": scale_by(views[held.param])}',
        '"scale": 1.0}',
        f"{U}optimizers.py",
    ),
    Mutant(
        "unlike matrices of one parameter get the first one's scale",
        "matrices.py",
        "SCALES[scale](m, n) / scale_of(view, scale)",
        "scale_of(view, scale) / scale_of(view, scale)",
        f"{U}several_matrices.py",
    ),
    Mutant(
        "steps are not counted",
        "base.py",
        "        local.count_step()\n",
        "",
        f"{U}optimizers.py",
    ),
    Mutant(
        "narrow momentum is kept wide",
        "states.py",
        "torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)",
        "torch.zeros_like(tensor, memory_format=torch.contiguous_format)",
        f"{U}optimizers.py {U}momentum.py {U}protocol.py {D}state_and_bytes.py",
    ),
    Mutant(
        "a step is made with gradients that are not finite",
        "base.py",
        "if not finite(self.param_groups, binding.differing):",
        "if False:",
        f"{U}several_matrices.py",
    ),
    Mutant(
        "biases decay",
        "groups.py",
        'decay_1d or group["role"] != VECTOR',
        "True",
        f"{U}groups.py {U}optimizers.py",
    ),
    Mutant(
        "rounding of a slice does not know where it lies",
        "local.py",
        "step=step, start=held.start)",
        "step=step, start=0)",
        f"{D}at_once.py",
    ),
    Mutant(
        "scales of int8 momentum all start at the first block",
        "lines.py",
        '(0 if unit.cut == "none" else position), count',
        "0, count",
        f"{D}momenta.py",
    ),
    Mutant(
        "the whole momentum is what one rank holds",
        "momenta.py",
        "return binding.comm_of(place[0]).all_reduce(whole)",
        "return whole",
        f"{D}momenta.py",
    ),
    Mutant(
        "ranks that were told different things go on",
        "base.py",
        "            self._alike.count(binding.peers, lambda: self._meant(binding))\n",
        "            pass\n",
        f"{D}alike.py",
    ),
    Mutant(
        "embeddings are orthogonalized",
        "routing.py",
        "if reason is None and self._defaults:",
        "if reason is None and not self._defaults:",
        f"{U}routing.py",
    ),
    Mutant(
        "rules with a rate for signs give the aux rule the whole rate",
        "groups.py",
        "lr, ratio = own.lr / share, 1 / share",
        "lr, ratio = own.lr, 1 / share",
        f"{U}groups.py {U}optimizers.py",
    ),
    # ------------------------------------------------------------------------------------------------ numbers
    Mutant(
        "two digits of keller's table change places",
        "schedules.py",
        "(3.4445, -4.7750, 2.0315)",
        "(3.4445, -4.7750, 2.0135)",
        f"{U}polar.py {U}optimizers.py",
    ),
    Mutant(
        "two digits of the polar express change places",
        "schedules.py",
        "(3.2856, -2.4153, 0.4853)",
        "(3.2856, -2.4513, 0.4853)",
        f"{U}polar.py {U}optimizers.py",
    ),
    Mutant(
        "five steps of the polar express have no safety",
        "schedules.py",
        "triples=_POLAR_EXPRESS_5, safety=1.02, alone=5",
        "triples=_POLAR_EXPRESS_5, alone=5",
        f"{U}polar.py {U}optimizers.py {U}range.py",
    ),
    Mutant(
        "the Gram form pairs steps that must go alone",
        "newton_schulz.py",
        "alone = 0 if dtype == torch.float32 else min(table.alone, steps)",
        "alone = 0",
        f"{U}polar.py {U}range.py",
    ),
    Mutant(
        "codes of int8 are cut off and not rounded",
        "momentum.py",
        "k += ((bits.float() + 0.5).mul_(k * 2 + 1) < above).float()",
        "k += 0.0",
        f"{U}momentum.py {U}native_library.py {U}native_bits.py",
    ),
    Mutant(
        "noise has a round less",
        "noise.py",
        "_ROUNDS = 7",
        "_ROUNDS = 6",
        f"{U}sto_sign_sgd.py {U}momentum.py",
    ),
    Mutant(
        "what finds partitions is never registered",
        "later.py",
        "        register()",
        "        pass",
        f"{U}imports.py",
    ),
    Mutant(
        "sub-groups are taken for one exchange",
        "sub_groups.py",
        "longest = sum(max(plan.loads) for plan in plans)",
        "longest = max(map(sum, zip(*(plan.loads for plan in plans), strict=True)))",
        f"{U}simulate.py",
    ),
    Mutant(
        "noise wraps after 2^32 elements",
        "noise.py",
        "counter += [element & _LOW, element >> 32 & _LOW]",
        "counter += [element & _LOW, element & 0]",
        f"{U}sto_sign_sgd.py {U}momentum.py",
    ),
    Mutant(
        "heads are cut along the columns' stride",
        "views.py",
        "(stacked * heads, rows // heads, self.columns)",
        "(stacked * heads, rows, self.columns)",
        f"{U}views.py",
    ),
    # ------------------------------------------------------------------------------------------------ zero
    Mutant(
        "master weights may be others than the model's",
        "partitions.py",
        "if not same(master, own[start : start + piece.numel]):",
        "if not same(master, master):",
        f"{D}wrong_layout.py {D}first_step.py",
    ),
    Mutant(
        "parameters that were thawed too late are not missed",
        "bind.py",
        "if id(member.parameter) not in there and is_optimized(member.parameter):",
        "if id(member.parameter) in there and not is_optimized(member.parameter):",
        f"{D}frozen.py",
    ),
    Mutant(
        "only the rank that has a problem raises",
        "agree.py",
        "for rank, found in enumerate(comm.gather_objects(mine)):",
        "for rank, found in enumerate([mine] if comm.gather_objects(None) else []):",
        f"{D}wrong_layout.py {D}bad_input.py",
    ),
    Mutant(
        "ranks with other models start together",
        "agree.py",
        "different = first_other(digests)",
        "different = None",
        f"{D}bad_input.py {D}one_config.py {D}robustness.py {D}ways_in.py",
    ),
    Mutant(
        "offload to NVMe is not refused",
        "refused.py",
        'return str(getattr(value, "value", value)).lower() == "nvme"',
        "return False",
        f"{U}config.py",
    ),
    Mutant(
        "a parameter without a gradient is stepped with what DeepSpeed's buffer held",
        "swapped.py",
        "if key not in zero.norm_for_param_grads and",
        "if False and",
        f"{D}nvme.py",
    ),
    Mutant(
        "buffers that are others' by now are saved",
        "swapped.py",
        "value.data = torch.empty(0, dtype=value.dtype, device=value.device)",
        "pass",
        f"{D}nvme.py",
    ),
    Mutant(
        "sums of rows are taken in the values' own memory",
        "selection.py",
        "lines.to(torch.float64, copy=True)",
        "lines.double()",
        f"{U}parameter_dtypes.py",
    ),
    Mutant(
        "groups of one rank are refused",
        "refused.py",
        "and number > limit",
        "and number >= limit",
        f"{U}config.py",
    ),
    Mutant(
        "DeepSpeed's one rate goes to every group whole",
        "schedulers.py",
        "params[key] = [value * part for part in shares(groups, optimizer.lr_ratios, kind)]",
        "params[key] = [value for part in shares(groups, optimizer.lr_ratios, kind)]",
        f"{D}schedulers.py",
    ),
    # ------------------------------------------------------------------------------------------------ checkpoints
    Mutant(
        "momentum of another dtype is loaded",
        "saved.py",
        "    if dtype != wanted:\n",
        "    if False:\n",
        f"{U}checkpoint_loadable.py {U}protocol.py {D}checkpoint.py",
    ),
    Mutant(
        "state of other parameters is loaded",
        "saved.py",
        "    if saved != own.parameters:\n",
        "    if False:\n",
        f"{U}checkpoint_loadable.py {U}protocol.py {D}checkpoint.py",
    ),
    Mutant(
        "hyperparameters of a universal load stay the first group's",
        "universal.py",
        "                group[key] = value\n",
        "                pass\n",
        f"{D}universal.py",
    ),
    Mutant(
        "int8 momentum is quantized as if every slice began a block",
        "pieces.py",
        "return quantize(values(portable, name, key, start, numel).float(), start)",
        "return quantize(values(portable, name, key, start, numel).float(), 0)",
        f"{U}checkpoint_convert.py {U}checkpoint_files.py {D}reshard.py",
    ),
    Mutant(
        "scales of another parameter's blocks are read",
        "portable.py",
        "runs.append(scales[blocks + skipped])",
        "runs.append(scales[blocks])",
        f"{U}checkpoint_files.py {D}reshard.py",
    ),
    Mutant(
        "a resharded count of steps is the smallest",
        "writer.py",
        "found[key] = max(known, value)",
        "found[key] = min(known, value)",
        f"{U}checkpoint_files.py {U}checkpoint_convert.py {D}unstepped.py {D}reshard.py",
    ),
    Mutant(
        "a resharded last partition keeps its padding",
        "writer.py",
        "lean.append(master[: master.numel() - padding].clone())",
        "lean.append(master.clone())",
        f"{U}checkpoint_files.py {D}reshard.py",
    ),
    Mutant(
        "addresses in the files are believed, not compared",
        "reader.py",
        "if {name: (address.numel, address.start) for name, address in mapping.items()} != held:",
        "if set(mapping) != set(held):",
        f"{U}checkpoint_files.py",
    ),
    Mutant(
        "files of different steps are joined",
        "states.py",
        "if list(map(_plain_values, of_rank)) != list(map(_plain_values, states[0])):",
        "if of_rank is None:",
        f"{U}checkpoint_files.py {U}checkpoint_loadable.py",
    ),
    Mutant(
        "a checkpoint of too few files is read",
        "reader.py",
        "if len(files.optimizers) != ranks:",
        "if len(files.optimizers) > ranks:",
        f"{U}checkpoint_files.py",
    ),
    Mutant(
        "a converted rate starts at its peak",
        "convert.py",
        'group["lr"] *= fraction',
        'group["lr"] *= 1.0',
        f"{U}checkpoint_convert.py {D}reshard.py",
    ),
    Mutant(
        "any momentum goes over to any rule",
        "convert.py",
        "if meant.get(buffer.key) == buffer.means:",
        "if buffer.key in meant:",
        f"{U}checkpoint_convert.py",
    ),
    # ------------------------------------------------------------------------------------------------ memory
    Mutant(
        "the estimate of stages 1 and 2 forgets padding",
        "estimate_terms.py",
        "return (sum(share.touched for share in mine) + padding) * zero.itemsize",
        "return sum(share.touched for share in mine) * zero.itemsize",
        f"{U}estimate.py {D}estimate_accounted.py",
    ),
    Mutant(
        "the estimate of stage 1 counts one bucket under overlap_comm",
        "estimate_terms.py",
        "on_device = bucket * (2 if zero.overlaps else 1)",
        "on_device = bucket",
        f"{U}estimate.py {D}estimate_accounted.py",
    ),
    Mutant(
        "shared storage is counted twice",
        "account.py",
        "if size == 0 or key in self._seen:",
        "if size == 0:",
        f"{U}memory.py",
    ),
    # ------------------------------------------------------------------------------------------------ survival
    Mutant(
        "checksums of files are not compared",
        "manifest.py",
        "return None if measure(path) == entry else",
        "return None if measure(path).size == entry.size else",
        f"{U}manifest.py",
    ),
    Mutant(
        "a manifest may name files outside of its folder",
        "manifest.py",
        ' or name.startswith("/") or ".." in parts:',
        ":",
        f"{U}manifest.py",
    ),
    Mutant(
        "a manifest's own checksum is not compared",
        "manifest.py",
        'if record.crc32 != _crc({key: raw[key] for key in ("format", "notes", "files")}):',
        "if record.crc32 < 0:",
        f"{U}manifest.py",
    ),
    Mutant(
        "a checkpoint is deleted before its seal",
        "manifest.py",
        "            (folder / name).replace(folder / _DELETING)\n            sync_folder(folder)\n",
        "            pass\n",
        f"{U}manifest.py {E}survival_of_faults.py",
    ),
    Mutant(
        "a run goes on from its oldest checkpoint",
        "resume.py",
        "for step in sorted(steps, reverse=True):",
        "for step in sorted(steps):",
        f"{U}manifest.py {U}read_back.py {E}survival.py",
    ),
    Mutant(
        "one checkpoint fewer is kept",
        "checkpoint.py",
        "step not in sealed[-keep:]",
        "step not in sealed[-keep + 1 :]",
        f"{U}manifest.py {E}survival.py",
    ),
    Mutant(
        "files of another run are loaded",
        "identity.py",
        "if key in expected and not (type(value) is type(expected[key]) and value == expected[key]):",
        "if key in expected and key != RUN and not (type(value) is type(expected[key]) and value == expected[key]):",
        f"{U}manifest.py {U}read_back.py {E}inputs.py",
    ),
    Mutant(
        "changed inputs are taken without a word",
        "inputs.py",
        "refused = [name for name in changed if name not in settings.accept]",
        "refused = [name for name in changed if name in settings.accept]",
        f"{E}inputs.py",
    ),
    # -------------------------------------------------------------------------------------------- trainers
    Mutant(
        "Adam's betas are taken where nobody set them",
        "trainer.py",
        "if values != [defaults.get(name) for name in names]:",
        "if values:",
        f"{U}hf.py",
    ),
    Mutant(
        "Accelerate is left to put its CPU Adam in place",
        "config.py",
        "config |= {key: loaded[key] for key in _FLAGS if key in loaded}",
        "pass",
        f"{U}hf.py",
    ),
    Mutant(
        "FSDP's slices pass for parameters",
        "binding.py",
        'getattr(tensor, "_fsdp_flattened", False)',
        "False",
        f"{U}plain_tensors.py",
    ),
    Mutant(
        "an added group follows one rate for all",
        "grouped.py",
        "self._lr_ratios += added.ratios",
        "self._lr_ratios += [1.0]",
        f"{U}habits_of_torch.py",
    ),
    Mutant(
        "SWALR's one rate stays one",
        "shares.py",
        "if is_one(groups, SWA):",
        "if False:",
        f"{U}habits_of_torch.py",
    ),
    Mutant(
        "a benchmark's ratio is told where its quartiles meet",
        "answers.py",
        "SPREAD if alone or (low <= base_high and base_low <= high)",
        "SPREAD if alone",
        f"{U}bench.py {E}pages.py",
    ),
    Mutant(
        "an optimizer's colour depends on who else is shown",
        "plots.py",
        "if (colour := _own_colour(name))}",
        "if (colour := _own_colour(name)) and len(names) < 3}",
        f"{U}report.py",
    ),
    Mutant(
        "grey text on white is too light",
        "page.css",
        "--quiet: #59636e",
        "--quiet: #8a94a0",
        f"{E}pages.py",
    ),
    Mutant(
        "a slider's label belongs to what it says",
        "estimate.html.j2",
        '<label for="ranks">',
        "<label>",
        f"{E}pages.py",
    ),
]


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the files that git knows, and of those it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        yield root


@contextmanager
def mutated(mutant: Mutant, root: Path) -> Iterator[None]:
    path = mutant.place(root)
    before = path.read_text("utf-8")
    _write(path, before.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        _write(path, before)


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):  # which is told from others by the second
        compiled.unlink()


def is_found(mutant: Mutant, root: Path, *options: str) -> tuple[bool, str]:
    """Whether a test fails on it, and the first that does."""
    log = root / "mutant.log"
    process = get_context("fork").Process(target=_run_tests, args=(root, log, [*options, *mutant.tests.split()]))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return False, f"no end within {LIMIT_S:g} s"
    said = log.read_text("utf-8", errors="replace")
    if process.exitcode == 5:  # all of them are left to --full
        return False, ""
    if process.exitcode > 2:  # (2: a file of tests that cannot even be imported)
        raise SystemExit(f"{mutant.name}: pytest ended with {process.exitcode}\n{said[-3000:]}")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.exitcode != 0, " ".join(failed[:1])[:200]


def _run_tests(root: Path, log: Path, arguments: list[str]) -> None:
    """In a process of its own, which finds torch and DeepSpeed imported, and this package in the copy."""
    os.setsid()
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "ds_optim")]:
        del sys.modules[name]
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ended = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(int(ended))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="what the default tier does not find, look for with --full")
    parser.add_argument("--only", default="", metavar="WORD", help="mutants with this in their name or file")
    parser.add_argument(
        "--jsonl",
        type=Path,
        metavar="FILE",
        help="a line for each mutant, appended; what stands in it is not run again",
    )
    given = parser.parse_args(arguments)
    known: list[str] = []
    if given.jsonl and given.jsonl.exists():
        known = [json.loads(line)["name"] for line in given.jsonl.read_text("utf-8").splitlines()]
    chosen = [m for m in MUTANTS if given.only in f"{m.name} {m.file}" and m.name not in known]
    alive = []
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("torch", "deepspeed", "hypothesis"):
        import_module(name)
    with copied_tree() as root:
        for mutant in MUTANTS:
            mutant.place(root)
        for mutant in chosen:
            began = time.monotonic()
            with mutated(mutant, root):
                (found, by), tier = is_found(mutant, root), "default"
                if not found and given.full:
                    (found, by), tier = is_found(mutant, root, "--full"), "full"
            took = time.monotonic() - began
            print(f"{tier if found else 'ALIVE':8} {took:6.1f} s  {mutant.file}: {mutant.name}", flush=True)
            if given.jsonl:
                line = {"name": mutant.name, "found": found, "tier": tier, "by": by, "seconds": round(took, 1)}
                with given.jsonl.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            alive += [] if found else [mutant.name]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} found" + "".join(f"\n  alive: {name}" for name in alive))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
