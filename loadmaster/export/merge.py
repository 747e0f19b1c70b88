"""Merge a LoRA adapter into its base, tensor by tensor: no model class, memory of about one shard.

    W' = W + s B A        s = alpha / r,  or alpha / sqrt(r) with rsLoRA        (A: r x in, B: out x r)

(Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.) The sum is taken in
float32 and rounded once, to the dtype of the export, so the only difference from the live adapter is
that one rounding of W'. peft's layout: `adapter_config.json` and `adapter_model.safetensors` with
`base_model.model.<module>.lora_A.weight`; embeddings have `lora_embedding_A` (r x vocabulary) and
`lora_embedding_B` (dim x r), whose update is s (B A)^T.

What cannot be written as a sum onto one weight is refused, by name: DoRA, biases, initialisations that
changed the base.

A QLoRA adapter was trained against W4 = dequantize(nf4(W)), not W. Merging it into W adds the rounding error
W - W4, which it never saw, and rounding the sum to 4 bits again loses part of the update; so it is merged
into W4 in 16 bits, which is the model that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loadmaster.errors import ExportRejected
from loadmaster.export.weights import (
    EMBEDDINGS,
    HEAD,
    embedding_name,
    read_tensor,
    rewrite,
    tensor_files,
    ties_embeddings,
)
from loadmaster.files import read_json

PREFIX = "base_model.model."
LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")

# Options of peft 0.21's LoraConfig under which the adapter is not W + s B A on the unchanged base.
UNMERGEABLE = {
    "use_dora": "DoRA rescales the columns of each weight",
    "lora_bias": "the adapter has biases of its own, which the base layers have no place for",
    "use_qalora": "QA-LoRA pools its input before A",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA is on only after its invocation tokens",
    "layer_replication": "layers were replicated",
    "target_parameters": "the adapter is on parameters that are not the weight of a module",
    "trainable_token_indices": "single rows of the embedding were trained",
    "monteclora_config": "MonteCLoRA samples its update",
    "kasa_config": "KaSA changes the base weights",
    "arrow_config": "Arrow routes between several adapters",
    "ensure_weight_tying": "the adapters of embedding and head are tied",
}
BASE_KEEPING_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Update:
    """The low-rank update of one module: names of its tensors in the adapter file, and its scale."""

    a: str
    b: str
    alpha: float
    rank_stabilised: bool
    transposed: bool
    """B A is the transpose of the stored weight (embeddings, and Conv1D layers: fan_in_fan_out)."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; tensors are read when they are needed."""

    file: Path
    updates: dict[str, Update]
    """Name of the base tensor -> its update."""
    replacements: dict[str, str]
    """Name of the base tensor -> adapter tensor that takes its place (modules_to_save)."""

    def delta(self, name: str) -> torch.Tensor:
        """s B A in float32, in the shape of the base tensor `name`."""
        update = self.updates[name]
        a, b = (read_tensor(self.file, key).to(torch.float32) for key in (update.a, update.b))
        rank = a.shape[0]
        scale = update.alpha / (math.sqrt(rank) if update.rank_stabilised else rank)
        product = (b @ a).mul_(scale)
        return product.T if update.transposed else product


@dataclass(frozen=True)
class MergeReport:
    merged_tensors: int
    replaced_tensors: int
    relative_update: float
    """Norm of all updates over the norm of the weights they were added to: 0 is an adapter that does nothing."""
    tied_embeddings: bool
    """Whether the merged model still shares embedding and head; config.json must say the same."""


def refusals(config: dict[str, Any]) -> list[str]:
    """Why an adapter with this adapter_config.json cannot be merged; empty where it can."""
    reasons = [f"{key}: {why}" for key, why in UNMERGEABLE.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {config.get('peft_type')}, not LORA")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']}: biases of the base were trained")
    init = config.get("init_lora_weights", True)
    if init not in BASE_KEEPING_INITS:
        reasons.append(f"init_lora_weights={init!r} changes the base weights themselves")
    return reasons


def read_adapter(folder: Path) -> Adapter:
    """Read peft's adapter folder and match its tensors to base tensors; refuse what is not W + s B A.

    Raises ExportRejected naming every reason.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file() or not (folder / "adapter_config.json").is_file():
        raise ExportRejected(f"{folder} has no adapter: adapter_config.json and adapter_model.safetensors are needed.")
    config = read_json(folder / "adapter_config.json")
    if reasons := refusals(config):
        raise ExportRejected(
            f"the adapter in {folder} cannot be merged into its base:\n  - " + "\n  - ".join(reasons) + "\n"
            "Export it as it is with export.formats=[adapter], or train a plain LoRA adapter."
        )
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    replacements: dict[str, str] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name = key.removeprefix(PREFIX)
            if match := LORA.match(name):
                pairs.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = key
            else:
                # A whole module that was trained, or the base weight of an embedding, which peft saves beside its LoRA.
                replacements[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = key
    updates = {}
    for (module, embedding), sides in pairs.items():
        if set(sides) != {"A", "B"}:
            raise ExportRejected(f"the adapter in {folder} is incomplete: {module} has no lora_{'AB'['A' in sides]}.")
        updates[f"{module}.weight"] = Update(
            a=sides["A"],
            b=sides["B"],
            alpha=_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]),
            rank_stabilised=bool(config.get("use_rslora")),
            transposed=embedding or bool(config.get("fan_in_fan_out")),
        )
    return Adapter(file, updates, replacements)


def merge(
    base: Path,
    target: Path,
    adapter: Adapter | None,
    dtype: torch.dtype | None,
    seen_as: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> MergeReport:
    """Write the weights of `base` with `adapter` merged in to `target`, shard by shard.

    dtype: of the floating-point tensors written; None keeps each tensor's own.
    seen_as: gives the base weight of a name as training saw it (`nf4_round_trip`); None: as it is stored.
    An adapter on one of a tied embedding and head unties them: the other keeps the base weight, as it does
    in training.
    Raises ExportRejected for an adapter that is not of this base, or that is not finite.
    """
    adapter = adapter or Adapter(Path(), {}, {})
    names = tensor_files(base)
    tied_embeddings = ties_embeddings(base)
    embedding = embedding_name(names)
    touched = adapter.updates.keys() | adapter.replacements.keys()
    untie = tied_embeddings and bool({HEAD, embedding} & touched)
    # A tied base may leave the head out of its files, or carry a copy that is never read.
    known = (names.keys() - {HEAD} if tied_embeddings else names.keys()) | ({HEAD} if untie else set())
    if unknown := sorted(touched - known):
        raise ExportRejected(
            f"the adapter changes {len(unknown)} tensors that {base} does not have ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}): trained on another base, or on modules that cannot be merged."
        )
    squared = {"update": 0.0, "weight": 0.0}

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        stored = dtype if dtype and weight.is_floating_point() else weight.dtype
        if name in adapter.replacements:
            weight = _checked(name, read_tensor(adapter.file, adapter.replacements[name]), weight.shape)
        elif seen_as is not None:
            weight = seen_as(name, weight)
        if name not in adapter.updates:
            return weight.to(stored)
        delta = _checked(name, adapter.delta(name), weight.shape)
        exact = weight.to(torch.float32)
        squared["update"] += float(delta.square().sum())
        squared["weight"] += float(exact.square().sum())
        return (exact + delta).to(stored)

    def change(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name == HEAD and tied_embeddings:
            return
        yield name, merged(name, weight)
        if untie and name == embedding:
            yield HEAD, merged(HEAD, weight)

    rewrite(base, target, change)
    return MergeReport(
        merged_tensors=len(adapter.updates),
        replaced_tensors=len(adapter.replacements),
        relative_update=math.sqrt(squared["update"] / squared["weight"]) if squared["weight"] else 0.0,
        tied_embeddings=tied_embeddings and not untie,
    )


def nf4_round_trip(dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """For `merge`: the weights of linear layers as QLoRA trains over them, quantized to nf4 and dequantized.

    dtype: the one that training computed in. Settings are those of loadmaster.models.load: blocks of 64, double
    quantization; embeddings, head and norms stay as they are.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def seen(name: str, weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() != 2 or name == HEAD or name.endswith(EMBEDDINGS):
            return weight
        packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
        return dequantize_4bit(packed, state).reshape(weight.shape)

    return seen


def _checked(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of the adapter, of the base's shape and finite; else ExportRejected."""
    if tensor.shape != shape:
        raise ExportRejected(
            f"the adapter's {name} has shape {tuple(tensor.shape)}, the base's {tuple(shape)}: "
            "it was trained on another base, or on a larger vocabulary."
        )
    if not torch.isfinite(tensor).all():
        raise ExportRejected(
            f"the adapter's {name} holds NaN or infinity: training diverged. "
            "Resume from an earlier checkpoint, with a lower optimizer.lr."
        )
    return tensor


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name, as peft reads `alpha_pattern`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
