"""Keys and addresses from the environment: what cannot be one is said before it is sent, and never shown."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_key(text: str) -> bool:
    """Whether it can be sent as one: it goes into a header."""
    return text.isascii() and text.isprintable() and " " not in text


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def is_readable_on_the_way(url: str) -> bool:
    """Whether others could read what is sent there: http to anywhere but this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return False
    try:
        return not ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname != "localhost"
