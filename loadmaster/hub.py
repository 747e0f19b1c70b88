"""The Hub's library as it is used here: one error at the end in place of its own warnings, and none of its tries (over
20 s) where the Hub's name cannot be resolved."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from loadmaster import catalog
from loadmaster.config.shipped import resolve_path

if TYPE_CHECKING:
    from loadmaster.config.schema import Job

OFFLINE = "HF_HUB_OFFLINE"
GATED = ("meta-llama/", "google/gemma-")
"""How names of models begin that the Hub gives to those alone who have accepted their licence. There are more."""

out_of_reach: str | None = None
"""Why the Hub is not asked, where `settle` found that out."""


def quieten() -> None:
    """Before the Hub's library is imported. A user's HF_HUB_VERBOSITY stays."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def settle(*models: str) -> None:
    """Go without the Hub where its name cannot be resolved; before its library is imported.

    models: of a command that asks the Hub for nothing but their config.json, and not where the catalogue has it. Behind
    a proxy, which resolves names itself, nothing is looked up.
    """
    global out_of_reach
    if (models and all(name.lower() in catalog.shapes() for name in models)) or OFFLINE in os.environ:
        return
    from urllib.request import getproxies  # brings http and ssl

    if set(getproxies()) & {"http", "https", "all"}:
        return
    try:
        host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        if _is_unknown(host):
            out_of_reach = f"{host} cannot be resolved: there is no network"
            os.environ[OFFLINE] = "1"
    except ValueError:  # HF_ENDPOINT is no address; the library says so
        return


def is_gated(model: str) -> bool:
    """Whether a model is known to be gated; False says nothing."""
    return model.lower().startswith(GATED)


def why_unreached() -> str | None:
    """Why the Hub is not asked: there is no network, or the user said so. None where it is."""
    told = os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")
    return out_of_reach or (f"{OFFLINE} is set" if told else None)


def settle_for(job: Job) -> None:
    """A job that is only planned asks for a shape; one that goes further may ask for anything, but where all is here.

    What runs elsewhere is not for this machine to judge.
    """
    is_local = job.model.path is not None and all(os.path.exists(resolve_path(path)) for path in job.data.paths)
    if job.launch.name == "local" and not is_local:
        settle(*([job.model.name] if job.stop_after == "plan" else []))


def _is_unknown(host: str | None) -> bool:
    """Whether a name cannot be resolved, asked again where that may pass."""
    for pause_s in (0.0, 1.0, 3.0):
        time.sleep(pause_s)
        try:
            socket.getaddrinfo(host, 443)
            return False
        except OSError as error:
            if error.errno != socket.EAI_AGAIN:
                break
    return True
