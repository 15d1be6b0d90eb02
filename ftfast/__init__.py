"""ftfast: fine-tune CLIP-like models without catastrophic forgetting, at hardware speed."""

from __future__ import annotations

__version__ = "0.1.0"
