"""Words that go with a number, and text of others as it may be shown."""

from __future__ import annotations

import re

PICTURES = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\x7f": "\u2421"}
PICTURES |= dict.fromkeys(map(chr, range(0x80, 0xA0)), "\ufffd")


def counted(number: int, what: str) -> str:
    """1 row; 1,000 rows."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def without_password(text: str) -> str:
    """Addresses in it without what stands before an @: a user's name, a password, a token."""
    return re.sub(r"(?<=://)[^/\s]+(?=@)", "...", text)


def visible(text: str) -> str:
    """Text with its control characters, which HTML forbids and a terminal obeys, as pictures (U+2400 and on)."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", lambda match: PICTURES[match[0]], text)
