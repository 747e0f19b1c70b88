"""The language model of a multimodal checkpoint, in a folder of its own: what is trained, exported and served.

Gemma 3 from 4B on, the dense Gemma 4, Mistral Small from 3.1 on, Ministral 3 and Qwen 2, 2.5 and 3 VL are a language
model behind a vision tower and a projector. Text never reaches those two, so they would take no gradient, and memory
for nothing. Their tensors are left behind; the language model's are copied once into the cache, byte for byte, by the
names that transformers' class for it alone has:

    language_model.model.*   model.language_model.*   ->  model.*
    model.layers.* and the like (Qwen 2 VL)           ->  as they are
    language_model.lm_head.*   lm_head.*              ->  lm_head.*

What is trained is then one of the families that are modelled exactly, and merged, whole and quantized exports are
models of text alone. An adapter is published by the multimodal model's names (`for_whole`), so that it goes onto the
checkpoint as it is on the Hub, and read by the language model's again (`of_whole`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loadmaster.errors import LoadmasterError
from loadmaster.files import cache_root, made_once, read_json, sha256_json, write_json
from loadmaster.model_files import INDEX, SINGLE, shards
from loadmaster.preflight.multimodal import TIED, language_model

WHERE = "MULTIMODAL"
"""In the folder that is made: where the multimodal checkpoint lies, and what was left behind."""
OTHERS = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", INDEX)
"""Files that the language model has otherwise, or not at all."""
NAMES = (
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^lm_head\."), "lm_head."),
    (re.compile(r"^model\.(?=(layers|embed_tokens|norm)\.)"), "model."),
)
PREFIX = "base_model.model."


def own_name(name: str) -> str | None:
    """What a tensor of the multimodal checkpoint is called in its language model; None: it is none of its."""
    return next((pattern.sub(new, name) for pattern, new in NAMES if pattern.match(name)), None)


def in_whole(module: str) -> str:
    """What a module of the language model is called in the multimodal one, as transformers builds it."""
    return re.sub(r"^model\.", "model.language_model.", module)


def multimodal_of(folder: Path) -> Path | None:
    """The multimodal checkpoint that the folder's language model was taken out of."""
    return Path(read_json(folder / WHERE)["folder"]) if (folder / WHERE).is_file() else None


def language_model_of(folder: Path) -> Path:
    """A folder with the language model of a multimodal checkpoint; any other folder as it is.

    Ends in the same two names as `folder`, by which a snapshot of the Hub is known. Raises LoadmasterError for files
    that hold none.
    """
    config = read_json(folder / "config.json")
    own = language_model(config) if isinstance(config, dict) else config
    if own is config:
        return folder
    there = Path(os.path.abspath(folder))
    files = sorted(file for file in there.iterdir() if file.is_file())
    facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    target = cache_root() / "models" / f"language-{sha256_json([own, facts])[:16]}" / there.parent.name / there.name
    return made_once(target, f"the language model of {there}", partial(_write, there, files, own))


def _write(folder: Path, files: list[Path], config: dict[str, Any], new: Path) -> None:
    for file in files:
        if file.name not in OTHERS and file.suffix != ".safetensors":
            (new / file.name).symlink_to(file)
    sources = shards(folder)
    if missing := [file.name for file in sources if not file.is_file()]:
        raise _incomplete(folder, f"{', '.join(missing)} of its index is not there")
    index: dict[str, str] = {}
    left: dict[str, int] = {}
    for file in sources:
        names, others = _copy(file, new / file.name)
        index |= dict.fromkeys(names, file.name)
        left |= others
    if not index:
        raise LoadmasterError(f"{folder} says that it is a multimodal model, and its files hold no language model")
    if set(index.values()) != {SINGLE}:
        size = sum(file.stat().st_size for file in new.glob("*.safetensors"))
        write_json(new / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    tied = read_json(folder / "config.json").get("tie_word_embeddings", config["language_model_of"] in TIED)
    if "lm_head.weight" not in index and tied:
        config = {**config, "tie_word_embeddings": True}
    write_json(new / "config.json", config)
    write_json(new / WHERE, {"folder": str(folder), "left_out": {"tensors": len(left), "bytes": sum(left.values())}})


def _copy(source: Path, target: Path) -> tuple[list[str], dict[str, int]]:
    """Copy a shard's tensors of the language model, if it has any; (their names, bytes of each other tensor)."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        opened = safe_open(source, "pt")
    except SafetensorError as error:
        raise _incomplete(source.parent, f"{source.name} is torn ({error})") from None
    with opened as old:
        own = {name: own_name(name) for name in old.keys()}  # noqa: SIM118 (it is no dict)
        taken = {new: old.get_tensor(name) for name, new in own.items() if new is not None}
        left = {name: old.get_tensor(name).nbytes for name, new in own.items() if new is None}
        if taken:
            save_file(taken, target, metadata=old.metadata())
    return list(taken), left


def _incomplete(folder: Path, why: str) -> LoadmasterError:
    return LoadmasterError(f"{folder} is no complete model: {why}\n    fix: download or save it again")


@contextmanager
def by_names_of(base: Path, adapter: Path, write: Callable[[Path, Path], None]) -> Iterator[Path]:
    """The adapter's folder; over the language model of a multimodal checkpoint one that `write` made of it."""
    if multimodal_of(base) is None:
        yield adapter
        return
    with TemporaryDirectory() as scratch:
        write(adapter, Path(scratch))
        yield Path(scratch)


def for_whole(folder: Path, target: Path) -> None:
    """Write an adapter of the language model, as peft saved it in `folder`, by the multimodal model's names."""
    config, tensors = _adapter(folder)
    modules = {_module(name) for name in tensors if ".lora_" in name}
    config["target_modules"] = sorted(in_whole(name) for name in modules)  # q_proj alone is the tower's as well
    config["modules_to_save"] = [in_whole(name) for name in config.get("modules_to_save") or []] or None
    _write_adapter(target, config, {PREFIX + in_whole(name.removeprefix(PREFIX)): t for name, t in tensors.items()})


def of_whole(folder: Path, target: Path) -> None:
    """The other way."""
    config, tensors = _adapter(folder)
    for key in ("target_modules", "modules_to_save"):
        config[key] = [own_name(f"{name}.").removesuffix(".") for name in config.get(key) or []] or None
    _write_adapter(target, config, {PREFIX + own_name(name.removeprefix(PREFIX)): t for name, t in tensors.items()})


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    return read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")


def _write_adapter(target: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    write_json(target / "adapter_config.json", config)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
