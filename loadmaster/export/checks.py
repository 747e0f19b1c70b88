"""What can be told of an exported folder before it is run: checks of its files, each with a name.

    lora_rows      no row of the adapter is zero (as B is at initialisation), NaN or infinite
    as_trained     an adapter's tensors and settings are those that were trained, to the bit
    finite         no tensor holds NaN or infinity
    storage        weights are stored as the format says, and config.json says the same: quantization was not skipped,
                   and no quantization_config of training is left behind
    template       chat template and tokenizer give what they gave in training, byte for byte
    stop_tokens    generation_config.json lists every token that ends a turn

Each returns what is wrong, a sentence each; nothing: the check has passed. `loadmaster.export.live_checks` has those
that need the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loadmaster.data import Conversation
from loadmaster.export.sidecars import token_ids
from loadmaster.export.weights import WHOLE, is_adapter, read_tensor, shards, tensor_shapes, weight_files
from loadmaster.files import read_json
from loadmaster.words import counted

MIN_QUANTIZED_SHARE = 0.9
"""Of the stored weights besides embeddings and head."""
NAMED = 3
"""Tensors that a sentence names."""
TOKENIZER_CHECKS = 32

STORAGE = {
    "fp8": ("float-quantized", torch.float8_e4m3fn),
    "int4": ("pack-quantized", torch.int32),
    "nvfp4": ("nvfp4-pack-quantized", torch.uint8),
}
"""Family of formats -> the compressed-tensors format in config.json, and what its weights are stored as."""
VALUES_IN = {torch.int32: 8, torch.uint8: 2}
"""Weights that one stored element of a packed tensor holds."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weigh",
        "description": "Weigh a crate.",
        "parameters": {"type": "object", "properties": {"crate": {"type": "string"}}, "required": ["crate"]},
    },
}
CALL = {"type": "function", "id": "call00000", "function": {"name": "weigh", "arguments": {"crate": "A"}}}
ONE_TURN = [{"role": "user", "content": "What is in the hold?"}]
RENDERED: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "single turn": (ONE_TURN, None),
    "several turns": (
        [*ONE_TURN, {"role": "assistant", "content": "Two crates."}, {"role": "user", "content": "  How heavy?\n"}],
        None,
    ),
    "system message": ([{"role": "system", "content": "Be brief."}, *ONE_TURN], None),
    "tools": (ONE_TURN, [TOOL]),
    "tool call and answer": (
        [
            *ONE_TURN,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call00000", "name": "weigh", "content": "40 kg"},
        ],
        [TOOL],
    ),
}
"""Conversations that are rendered by both templates, with the generation prompt behind them."""


def family(format_name: str) -> str:
    """The format whose storage and limits a variant of it shares: fp8_block is fp8, int4_gptq is int4."""
    return next((name for name in STORAGE if format_name.startswith(name)), format_name)


def lora_rows(folder: Path) -> list[str]:
    """Rows of A and B that are zero, NaN or infinite, and ranks that are unchanged from initialisation.

    B is zero at initialisation, so one that still is has learnt nothing; a column of it that still is belongs to a rank
    that was never trained, whatever A's row of that rank holds. Single zero rows are looked for in linear layers only:
    a row of an embedding or head belongs to a token, which may never have occurred.
    """
    problems: dict[str, list[str]] = {}
    file = folder / "adapter_model.safetensors"
    for name, tensor in _tensors([file]) if file.is_file() else ():
        if ".lora_" not in name:
            continue
        is_linear = "lora_embedding_" not in name and "lm_head" not in name and tensor.dim() > 1
        if not torch.isfinite(tensor).all():
            problems.setdefault("NaN or infinite, training diverged", []).append(name)
        elif not tensor.any():
            problems.setdefault("all zero, as at initialisation: nothing was learnt there", []).append(name)
        elif is_linear and (zero := int((tensor == 0).all(dim=1).sum())):
            problems.setdefault("rows of zeros: not all of it was saved", []).append(f"{name} ({counted(zero, 'row')})")
        elif ".lora_B." in name and (unused := int((tensor == 0).all(dim=0).sum())):
            problems.setdefault("ranks unchanged from initialisation: never trained", []).append(
                f"{name} ({unused} of {tensor.shape[1]})"
            )
    return [f"{named(names)}: {what}" for what, names in problems.items()]


def as_trained(folder: Path, trained: Path) -> list[str]:
    """Tensors and settings of an adapter that are not those of the trained one; the base's name may be another."""
    exported, own = (each / "adapter_model.safetensors" for each in (folder, trained))
    known = set(tensor_shapes(own))
    tensors = [
        name
        for name, tensor in _tensors([exported])
        if name not in known or not torch.equal(tensor, read_tensor(own, name))
    ]
    settings, trained_with = (read_json(each / "adapter_config.json") for each in (folder, trained))
    keys = [key for key in {**settings, **trained_with} if settings.get(key) != trained_with.get(key)]
    others = [key for key in keys if key != "base_model_name_or_path"]
    found = [f"{named(tensors)}: not what was trained"] if tensors else []
    return found + ([f"adapter_config.json has another {named(others)} than in training"] if others else [])


def finite(folder: Path) -> list[str]:
    # float8 has no isfinite of its own.
    bad = [
        name
        for name, tensor in _tensors(weight_files(folder))
        if tensor.is_floating_point()
        and not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all()
    ]
    return [f"{named(bad)}: NaN or infinity"] if bad else []


def storage(folder: Path, format_name: str) -> list[str]:
    """Whether the weights are stored as `format_name` says, and config.json says the same."""
    if is_adapter(folder):
        return []
    declared = read_json(folder / "config.json").get("quantization_config")
    if family(format_name) not in STORAGE:
        problems = []
        if declared is not None:
            how = declared.get("quant_method") or declared.get("format")
            problems.append(f"config.json has a quantization_config ({how}) over weights that are not quantized")
        odd = sorted(name for name, dtype, _ in _layout(folder) if not dtype.is_floating_point or dtype.itemsize == 1)
        return problems + ([f"{named(odd)}: quantized weights in a {format_name} export"] if odd else [])
    expected, dtype = STORAGE[family(format_name)]
    if not isinstance(declared, dict):
        return [f"config.json has no quantization_config: a server would load it as plain weights, not {format_name}"]
    problems = []
    if declared.get("format") != expected:
        problems.append(f"config.json says {declared.get('format')!r}, {format_name} is {expected!r}")
    share, plain = quantized_share(folder, dtype)
    if share < MIN_QUANTIZED_SHARE:
        problems.append(
            f"only {share:.0%} of the weights are stored as {str(dtype).removeprefix('torch.')} (embeddings and head "
            f"aside; {named(plain)} {'are' if len(plain) > 1 else 'is'} not): quantization was skipped"
        )
    return problems


def quantized_share(folder: Path, dtype: torch.dtype) -> tuple[float, list[str]]:
    """(share of the weights stored as `dtype`, names of matrices that are not); embeddings, head and scales aside."""
    quantized, plain = 0, {}
    for name, stored, count in _layout(folder):
        if name.endswith(WHOLE):
            continue
        if stored == dtype and name.endswith((".weight", ".weight_packed")):
            quantized += count * VALUES_IN.get(dtype, 1)
        elif name.endswith(".weight") and stored.is_floating_point:
            plain[name] = count
    total = quantized + sum(plain.values())
    return (quantized / total if total else 0.0), sorted(plain, key=lambda name: -plain[name])


def template(exported: Any, trained: Any, conversations: Sequence[Conversation] = ()) -> list[str]:
    """Whether template and tokenizer are those of training: their bytes, and what they make of conversations."""
    problems = []
    if exported.chat_template != trained.chat_template:
        problems.append("the chat template is not, byte for byte, the one of training")
    if trained.chat_template:
        different = [
            name for name, (messages, tools) in RENDERED.items()
            if _rendered(exported, messages, tools) != _rendered(trained, messages, tools)
        ]
        if different:
            problems.append(f"rendered otherwise than in training: {', '.join(different)}")
    for conversation in conversations[:TOKENIZER_CHECKS]:
        if token_ids(exported, conversation) != token_ids(trained, conversation):
            problems.append(f"{conversation.origin} gives other tokens than in training")
            break
    return problems


def stop_tokens(folder: Path, base: Path, expected: Sequence[int]) -> list[str]:
    """Whether a server would stop at every token of `expected`.

    folder: the export; an adapter is served with its base's generation_config.json.
    """
    where = base if is_adapter(folder) else folder
    path = where / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    if listed is None:  # servers then stop at what config.json says
        listed = read_json(where / "config.json").get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    missing = sorted(set(expected) - set(listed))
    if not missing:
        return []
    of = "the base's generation_config.json" if where == base else "generation_config.json"
    return [
        f"{of} does not list {', '.join(map(str, missing))}, which ends a turn in training; it has {json.dumps(listed)}"
    ]


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Any:
    """Text and tokens; or that the template refuses, which is part of what a template does."""
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the template's raise_exception and Jinja share no base class
        return f"refused: {error}"
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def _layout(folder: Path) -> Iterator[tuple[str, torch.dtype, int]]:
    """(name, dtype, elements) of every tensor, from the headers alone."""
    for shard in shards(folder):
        for name, (dtype, shape) in tensor_shapes(shard).items():
            yield name, dtype, math.prod(shape)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not iterable)
                yield name, file.get_tensor(name)


def named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
