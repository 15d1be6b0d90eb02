"""Make open_clip's own trainer use the fused losses, without editing it.

Three lines replace the losses in the stock trainer::

    from ftfast.integrations.open_clip import patch
    patch()
    from open_clip_train.main import main; main(sys.argv[1:])

or, as a command: ``torchrun --nproc-per-node 8 -m ftfast.integrations.open_clip --train-data ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from ftfast import losses
from ftfast.errors import MissingExtraError

REPLACED = ("ClipLoss", "SigLipLoss", "DistillClipLoss")


class Patch:
    """The replacement of open_clip's loss classes; undone by :meth:`undo` or at the end of a ``with`` block.

    Args:
        replacements: Name of a class in ``open_clip.loss`` to the class that takes its place.
    """

    def __init__(self, replacements: dict[str, type[nn.Module]]) -> None:
        self._replacements = replacements
        self._changed: list[tuple[ModuleType, str, Any]] = []

    def apply(self) -> Patch:
        """Replace the classes in every open_clip module that holds them: its factories and later imports see ours.

        Returns:
            Itself.
        """
        loss_module = _open_clip_loss()
        originals = {name: getattr(loss_module, name) for name in self._replacements if hasattr(loss_module, name)}
        for module in _open_clip_modules():
            for name, original in originals.items():
                if module.__dict__.get(name) is original:
                    self._changed.append((module, name, original))
                    setattr(module, name, self._replacements[name])
        return self

    def undo(self) -> None:
        """Put open_clip's own classes back."""
        while self._changed:
            module, name, original = self._changed.pop()
            setattr(module, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch()


_active: Patch | None = None


def patch(*, ring: bool = False, backend: str = "auto") -> Patch:
    """Replace open_clip's ``ClipLoss``, ``SigLipLoss`` and ``DistillClipLoss`` by the fused ones.

    ``open_clip.create_loss``, and so ``open_clip_train.main``, then builds fused losses; models, data and loop stay as
    they are. Loss objects made before the call are not touched; ``CoCaLoss`` keeps its own implementation. Calling
    ``patch`` again replaces the earlier patch.

    Args:
        ring: Exchange features around a ring of processes (memory O(local batch x width)) instead of gathering them.
        backend: Backend of the fused operations: "auto", "triton" or "torch".

    Returns:
        The patch, usable as a context manager; :func:`unpatch` also undoes it.

    Raises:
        MissingExtraError: If open_clip is not installed.

    Example:
        >>> import open_clip
        >>> from ftfast.integrations.open_clip import patch
        >>> with patch():
        ...     open_clip.ClipLoss.__module__.startswith("ftfast")
        True
        >>> open_clip.ClipLoss.__module__
        'open_clip.loss'
    """
    global _active
    unpatch()
    options = {"ring": ring, "backend": backend}
    replacements = {name: _with_defaults(getattr(losses, name), options) for name in REPLACED}
    _active = Patch(replacements).apply()
    return _active


def unpatch() -> None:
    """Undo :func:`patch`; does nothing if open_clip is not patched."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run open_clip's stock trainer with the fused losses.

    Args:
        argv: The trainer's own arguments; the command line's by default.

    Raises:
        MissingExtraError: If open_clip or its trainer's requirements are not installed.
    """
    patch()
    try:
        from open_clip_train.main import main as train
    except ImportError as error:
        raise MissingExtraError(error.name or "open_clip_train", "data", "open_clip's trainer") from error
    train(list(sys.argv[1:] if argv is None else argv))


def _with_defaults(loss: type[nn.Module], options: dict[str, Any]) -> type[nn.Module]:
    """Subclass a loss so that open_clip's constructor call gets our extra keywords as well."""

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        loss.__init__(self, *args, **{**options, **kwargs})

    return type(loss.__name__, (loss,), {"__init__": __init__, "__doc__": loss.__doc__, "__module__": loss.__module__})


def _open_clip_loss() -> ModuleType:
    try:
        import open_clip.loss
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "dev", "Patching open_clip") from error
    return open_clip.loss


def _open_clip_modules() -> list[ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] in {"open_clip", "open_clip_train"}]
    return [module for name in names if isinstance(module := sys.modules[name], ModuleType)]


if __name__ == "__main__":
    main()
