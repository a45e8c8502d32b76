"""Adapters: the kernels inside other engines."""
