"""Compiled kernels for a CPU, the weight layouts they read, and the decoder blocks made of them."""
