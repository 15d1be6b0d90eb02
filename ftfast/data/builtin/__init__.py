"""The built-in data set: about ten thousand drawings in three hands, offline, from two pip packages.

``load_builtin("pairs/train")`` opens one split; ``python -m ftfast.data.builtin --describe`` lists all of them.
"""

from ftfast.data.builtin.groups import TASK_ORDERS, TASKS
from ftfast.data.builtin.rendering import IMAGE_SIZE, STYLES, cache_root
from ftfast.data.builtin.splits import BUILTIN_SPLITS, BuiltinSplit, describe, load_builtin

__all__ = [
    "BUILTIN_SPLITS",
    "IMAGE_SIZE",
    "STYLES",
    "TASKS",
    "TASK_ORDERS",
    "BuiltinSplit",
    "cache_root",
    "describe",
    "load_builtin",
]
