"""Compiled kernels of a CPU, the layouts they read, and the blocks made of them."""
