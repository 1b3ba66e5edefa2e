"""Which definitions of the metrics a result follows."""

__all__ = ["DEFINITIONS"]

DEFINITIONS = 2
"""Raised when the same name comes to mean another number: results by other definitions are not taken up again."""
