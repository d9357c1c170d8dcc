"""``python -m adadagrad`` is the same as the command ``adadagrad``."""

from __future__ import annotations

import sys

from adadagrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
