"""Exact nearest neighbours: the only user of the C++/CUDA extension."""
