"""AdamW as an aux rule, for the small part of a model that is no matrix (arXiv 1711.05101).

As a yardstick for a whole model use DeepSpeed's own AdamW, which the JSON type "AdamW" still means.
"""

from __future__ import annotations

from ds_optim.optimizers.checks import check_betas
from ds_optim.optimizers.rules import MOMENTUM, SECOND_MOMENT, AdamWUpdate, Group, rule

EPS = 1e-8


@rule("adamw", hyper={"betas": check_betas}, buffers=(MOMENTUM, SECOND_MOMENT))
def adamw(group: Group, step: int) -> AdamWUpdate:
    return AdamWUpdate(lr=group["lr"], decay=group["weight_decay"], betas=tuple(group["betas"]), eps=EPS, step=step + 1)
