"""Runpod: a typed client of REST API v2. `RunpodClient` for calls, the dataclasses of types.py for what they carry."""

from loadmaster.launch.runpod.client import RunpodClient
from loadmaster.launch.runpod.http import Api, NotSent, Patience, Refused, from_environment

__all__ = ["Api", "NotSent", "Patience", "Refused", "RunpodClient", "from_environment"]
