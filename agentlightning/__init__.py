"""Exact token ids from an unmodified vLLM.

This module is executed in every interpreter that the `.pth` file arms, so it imports nothing.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
