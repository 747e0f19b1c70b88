"""Dated facts about GPUs, machines, prices and public models. No code here computes; preflight does.

gpus.yaml, machines.yaml, prices.yaml, serving.yaml, servers.yaml and shapes/*.json are read once a process. A price
file of the user's own, where there is one, comes before the shipped prices.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from loadmaster.errors import ConfigError

FOLDER = Path(__file__).parent


@cache
def _read(name: str) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader=loader)


def gpus() -> dict[str, dict[str, Any]]:
    """Facts of each GPU by its name here (`h100_80gb`); units are in the keys."""
    return _read("gpus.yaml")["gpus"]


def machines() -> list[dict[str, Any]]:
    """Machines that can be rented: GPU, count, host memory, disk, links between nodes."""
    return _read("machines.yaml")["machines"]


PRICES_VARIABLE = "LOADMASTER_PRICES"
PRICE_FILE = "{date: DAY, source: TEXT, gpus: {NAME: {pod_usd_per_hour: NUMBER, date: DAY}}}"


def price_file() -> Path:
    """Where `loadmaster prices --refresh` writes: $LOADMASTER_PRICES, or loadmaster/prices.yaml with other settings."""
    if named := os.environ.get(PRICES_VARIABLE):
        return Path(named).expanduser()
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "loadmaster" / "prices.yaml"


def prices() -> dict[str, Any]:
    """Prices in US dollars with the date and source of each: the shipped ones, and over them the user's price file.

    Raises ConfigError where the price file that $LOADMASTER_PRICES names is not there, or is none.
    """
    path = price_file()
    if os.environ.get(PRICES_VARIABLE) and (path.is_dir() or not path.exists()):
        message = "is a folder" if path.is_dir() else "there is no such file"
        remedy = f"{PRICES_VARIABLE} with the path of a price file, or without it, for the shipped prices"
        if not path.exists():
            remedy += "; `loadmaster prices --refresh` writes this one"
        raise ConfigError.of("price file", str(path), message, remedy, PRICES_VARIABLE)
    return _prices(path, path.stat().st_mtime_ns if path.is_file() else None)


@cache
def _prices(path: Path, modified_ns: int | None) -> dict[str, Any]:
    shipped = _read("prices.yaml")
    if modified_ns is None:
        return shipped
    own = _own_prices(path)
    gpus = {**shipped["gpus"], **own["gpus"]}
    for name in shipped["gpus"].keys() & own["gpus"]:
        gpus[name] = {**shipped["gpus"][name], "hosts": None, **own["gpus"][name]}
    dates = {"serverless_date": own["date"]} if own.get("serverless") else {}
    return {**shipped, **dates, "gpus": gpus, "sources": {**shipped["sources"], own["date"]: own["source"]}}


def _own_prices(path: Path) -> dict[str, Any]:
    """The user's price file. Raises ConfigError where plans cannot count by it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        for gpu, price in own["gpus"].items():
            {**_read("prices.yaml")["gpus"].get(gpu, {}), **price}["pod_usd_per_hour"], price["date"]
        wrong = [f"{gpu}.{key} is {value!r}" for gpu, price in own["gpus"].items() for key, value in price.items()
                 if key.endswith("usd_per_hour") and not (isinstance(value, int | float) and value > 0)]
        own["date"], own["source"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        wrong = [" ".join(str(error).split()) if isinstance(error, OSError | yaml.YAMLError) else "it lacks a field"]
    if not wrong:
        return own
    origin = PRICES_VARIABLE if os.environ.get(PRICES_VARIABLE) else "your settings"
    message = f"is no list of prices, {PRICE_FILE}: {wrong[0]}"
    remedy = "`loadmaster prices --refresh` writes it anew; without it the shipped prices count"
    raise ConfigError.of("price file", str(path), message, remedy, origin)


def serving() -> dict[str, Any]:
    """GPU pools of endpoints, and how long a worker takes to start."""
    return _read("serving.yaml")


def servers() -> dict[str, Any]:
    """What each version of each inference server reads."""
    return _read("servers.yaml")


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """config.json values of public models by Hub id (lower case)."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((FOLDER / "shapes").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        for name in entry["names"]:
            found[name.lower()] = {**entry["config"], "_parameters": entry["parameters"], "_name": name}
    return found
