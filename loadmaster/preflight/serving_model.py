"""The model of plan-serving: `model=` takes a folder with config.json, a name of conf/model, or a Hub id."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from loadmaster import catalog
from loadmaster.config.fields import nearest
from loadmaster.config.schema import ModelConfig
from loadmaster.config.shipped import local_path, shipped_folder
from loadmaster.errors import ConfigError, Problem
from loadmaster.preflight.config_json import find_config, nearest_names, refuse_kinds
from loadmaster.preflight.families import FAMILIES, refuse_uncountable


def named(word: str) -> ModelConfig:
    """What `word` names; of a folder or Hub id that is not there too."""
    folder, file = local_path(word), short_names().get(word)
    if not os.path.isfile(folder / "config.json") and file is not None:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
        return ModelConfig(**{key: held[key] for key in ("name", "path", "revision") if key in held})
    is_id = word.lower() in catalog.shapes() or not (os.path.isdir(folder) or word.startswith((".", "/", "~")))
    if is_id and not os.path.isfile(folder / "config.json"):
        return ModelConfig(name=word)
    return ModelConfig(name=folder.resolve().name, path=str(folder))


def short_names() -> dict[str, Path]:
    """Options of the job's group `model`; a file of the current folder's conf/ wins over a shipped one."""
    folders = (shipped_folder("conf"), Path("conf"))
    return {file.stem: file for folder in folders for file in sorted((folder / "model").glob("*.yaml"))}


def model_and_config(word: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Raises ConfigError where there is no config.json, or one of layers that cannot be counted."""
    model = named(word)
    folder = None if model.path is None else local_path(model.path)
    if folder is not None and not os.path.isfile(folder / "config.json"):
        is_here = os.path.isdir(folder)
        message = "this folder has no config.json" if is_here else "there is no such folder"
        found = sorted(folder.glob("export/*/config.json")) if is_here else []
        exported = next((file.parent for file in found), None)
        remedy = f"model={exported}, what this run exported" if exported else _models(word)
        raise ConfigError([Problem("model", word, "command line", message, remedy)])
    try:
        config, _ = find_config(model)
    except ConfigError as error:
        own = {"key": "model", "value": word, "origin": "command line", "remedy": _models(word)}
        raise ConfigError([replace(problem, **own) for problem in error.problems]) from None
    refuse_kinds(config, model.path or model.name)
    try:
        refuse_uncountable(config, model.name)
    except ConfigError as error:
        remedy = "a model of one of these types: " + ", ".join(FAMILIES)
        raise ConfigError([replace(problem, remedy=remedy) for problem in error.problems]) from None
    return model, config


def _models(word: str) -> str:
    short = nearest(word, short_names())
    names = [*([short] if short else []), *nearest_names(word, 3)]
    return "model=FOLDER with a model's config.json, or model=" + " or ".join(names)
