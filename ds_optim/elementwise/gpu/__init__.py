"""The hot steps on a GPU in Triton, one pass over memory each. Only ``launch`` is for others.

Bits are the eager path's, but for AdamW's last one (``kernels.adamw_step``) and what Triton 3.5 flushes (``tiles``).

``tiles`` reads, writes and rounds a tile of elements, ``kernels`` are the steps, ``launch`` calls them.
"""
