"""The Hub's library as it is used here: one error at the end in place of its own warnings, and no long wait where the
Hub's name cannot be resolved. A user's HF_HUB_VERBOSITY stays; what fails otherwise is tried again as often as ever.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from loadmaster import catalog

if TYPE_CHECKING:
    import httpx

    from loadmaster.config.schema import Job

UNRESOLVED = 3
"""Times in a row that a name may fail to resolve, a second or two apart, before the Hub counts as out of reach."""


def quieten() -> None:
    """Costs nothing; before the Hub's library is imported."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def settle(*models: str) -> None:
    """Before the first use of the Hub; costs the import of its HTTP client.

    models: of a command that asks the Hub for nothing but their config.json, and not where the catalogue has it.
    """
    if models and all(name.lower() in catalog.shapes() for name in models):
        return
    from huggingface_hub import set_client_factory

    try:
        from huggingface_hub.utils._http import default_client_factory
    except ImportError:  # a version that makes its client elsewhere keeps it
        return
    set_client_factory(lambda: _patient(default_client_factory()))


def settle_for(job: Job) -> None:
    """A job that is only planned asks for a shape; one that goes further may ask for anything."""
    settle(*([job.model.name] if job.stop_after == "plan" else []))


_failed = 0


def _patient(client: httpx.Client) -> httpx.Client:
    """Raises as in the library's offline mode, which is not tried again, once names cannot be resolved."""
    from httpx import ConnectError
    from huggingface_hub.errors import OfflineModeIsEnabled

    send = client.send

    def once(request: httpx.Request, **options: Any) -> httpx.Response:
        global _failed
        try:
            response = send(request, **options)
        except ConnectError as error:
            if not _is_unresolved(error):
                raise
            _failed += 1
            if _failed <= UNRESOLVED:
                raise
            raise OfflineModeIsEnabled(f"{request.url.host} cannot be resolved: there is no network") from error
        _failed = 0
        return response

    client.send = once  # type: ignore[method-assign]
    return client


def _is_unresolved(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, socket.gaierror):
        seen = seen.__cause__ or seen.__context__
    return seen is not None
