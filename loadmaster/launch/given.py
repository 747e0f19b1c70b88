"""Keys and addresses from the environment: what cannot be one is said before it is sent, and never shown."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def wrong_key(variable: str, text: str, page: str) -> str | None:
    """Why what a variable holds cannot be sent as a key, which goes into a header. page: where the console has it."""
    if text.isascii() and text.isprintable() and " " not in text:
        return None
    return (
        f"{variable} holds characters that no key has (spaces, line breaks, letters with accents): copy it anew from "
        f"the console (Settings, {page})"
    )


def wrong_address(variable: str, url: str, like: str, harm: str) -> str | None:
    """Why nothing is sent to the address that a variable holds. harm: what anyone on the way to it could do."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    remedy = f"{like}, or unset it for the provider's own"
    if not is_one:
        return f"{variable} is no address: {remedy}"
    if is_readable_on_the_way(url):
        why = f"begins with http://, and anyone on the way could {harm}"
        return f"{variable} {why}: {remedy} (http is for this machine alone)"
    return None


def is_readable_on_the_way(url: str) -> bool:
    """Whether others could read what is sent there: http to anywhere but this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return False
    try:
        return not ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname != "localhost"
