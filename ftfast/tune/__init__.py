"""Hyper-parameter search on validation data: ``ftfast tune``."""
