"""Fused operations on tensors: similarity losses, penalties, Fisher accumulation. Imported as ``ftfast.kernels``."""
