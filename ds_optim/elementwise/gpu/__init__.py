"""The steps and measures of every rule on a GPU in Triton, one pass over memory each. Only ``fused`` calls them.

Bits are the eager path's, but for AdamW's last one (``rules.adamw_step``) and what Triton 3.5 flushes (``tiles``).

``tiles`` reads, writes and rounds a tile of elements, ``rules`` are the formulas, ``kernels`` takes one of them through
the slices of a table, ``launch`` makes the table.
"""
