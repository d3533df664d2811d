"""Triton kernels. Imported lazily: a machine without CUDA needs no Triton."""
