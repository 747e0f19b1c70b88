"""Words that go with a number."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """1 row; 1,000 rows."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"
