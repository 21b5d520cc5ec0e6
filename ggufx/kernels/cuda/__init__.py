"""Triton twins of the CPU kernels, found by the same names; importing this package loads neither torch nor triton."""
