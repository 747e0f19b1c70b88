"""Python's collector of cycles, off while a process starts, plans and imports: what is made then stays until the end,
and the collector would walk over all of it again and again."""

from __future__ import annotations

import gc


def pause() -> None:
    """For an entry point alone, before its imports; whoever goes on to long work calls `resume`."""
    gc.disable()


def leave() -> None:
    """At the end of a process that never resumed: what is left goes with it, and is not walked over once more."""
    if not gc.isenabled():
        gc.freeze()


def resume() -> None:
    """Collect again, but never among what was there before. Does nothing where nobody paused."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
