"""One-momentum, matrix-aware optimizers for DeepSpeed ZeRO."""
