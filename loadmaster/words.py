"""Words that go with a number, and those that are kept."""

from __future__ import annotations

import re


def counted(number: int, what: str) -> str:
    """1 row; 1,000 rows."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def without_password(text: str) -> str:
    """Addresses in it without what stands before an @: a user's name, a password, a token."""
    return re.sub(r"(?<=://)[^/\s]+(?=@)", "...", text)
