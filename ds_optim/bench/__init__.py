"""Benchmarks side by side in one run: training steps, wire bytes, orthogonalization, elementwise steps, and the
machine's own limits beside them."""
