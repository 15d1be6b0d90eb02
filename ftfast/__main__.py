"""``python -m ftfast``."""

from __future__ import annotations

import sys

from ftfast.cli import main

sys.exit(main())
