"""AdamW as an aux rule, for the small part of a model that is no matrix (arXiv 1711.05101).

As a yardstick for a whole model use DeepSpeed's own AdamW, which the JSON type "AdamW" still means.
"""

from __future__ import annotations

from ds_optim.optimizers.checks import check_betas
from ds_optim.optimizers.rules import ROOT_SQUARES, WIDE_MEAN, Group, rule
from ds_optim.optimizers.updates import AdamWUpdate

EPS = 1e-8


@rule("adamw", hyper={"betas": check_betas}, aux={"lr": 3e-4, "betas": (0.9, 0.95)}, buffers=(WIDE_MEAN, ROOT_SQUARES))
def adamw(group: Group, step: int) -> AdamWUpdate:
    return AdamWUpdate(lr=group["lr"], decay=group["weight_decay"], betas=tuple(group["betas"]), eps=EPS, step=step + 1)
