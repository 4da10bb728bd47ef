"""The hot steps on a GPU in Triton: the eager path's bits in one pass over memory. Only ``launch`` is for others.

``tiles`` reads, writes and rounds a tile of elements, ``kernels`` are the steps, ``launch`` calls them.
"""
