"""Runpod: a typed client of REST API v2. `RunpodClient` for calls, the dataclasses of types.py for what they carry."""

from loadmaster.launch.runpod.client import LogEvent, RunpodClient
from loadmaster.launch.runpod.http import Api, NotSent, Patience, Refused, Throttled, Unsure, from_environment

__all__ = [
    "Api",
    "LogEvent",
    "NotSent",
    "Patience",
    "Refused",
    "RunpodClient",
    "Throttled",
    "Unsure",
    "from_environment",
]
