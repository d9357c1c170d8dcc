"""The version of the installed library."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("adadagrad")
