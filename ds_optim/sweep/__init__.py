"""Many short runs side by side: the cells of ds-optim compare and memory, their ranks, their rows."""
