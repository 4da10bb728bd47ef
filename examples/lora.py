"""PEFT's LoRA in transformers' Trainer: the adapters alone are routed and stepped.

Run: torchrun --nproc-per-node 2 -m examples.lora
"""

from __future__ import annotations

import sys
from typing import Any

from peft import LoraConfig, get_peft_model

from examples import small, trainer


def model() -> Any:
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(small.model(), adapters)


def main(config: Any = small.CONFIG, out: str = "out/lora", resume: str | None = None) -> tuple[list[float], str]:
    """The losses of the steps that were taken, and the class of the optimizer that took them."""
    return trainer.main(config, out, resume, model=model())


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
