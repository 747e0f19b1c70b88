"""A LoRA adapter as peft writes it: what its files hold, and the update that they are of each base tensor.

peft's layout: `adapter_config.json` and `adapter_model.safetensors` with `base_model.model.<module>.lora_A.weight`;
embeddings have `lora_embedding_A` (r x vocabulary) and `lora_embedding_B` (dim x r), whose update is s (B A)^T.

What cannot be written as a sum onto one weight is refused, by name: biases, initialisations that changed the base.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loadmaster.errors import ExportRejected
from loadmaster.export.weights import EMBEDDINGS, HEAD, read_tensor
from loadmaster.files import read_json
from loadmaster.models.dora import LEAST_NORM

PREFIX = "base_model.model."
LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")

MAGNITUDES = ".lora_magnitude_vector"

# Options of peft 0.21's LoraConfig under which the adapter is not W + s B A on the unchanged base.
UNMERGEABLE = {
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
    magnitudes: str | None = None
    """DoRA: name of the norms that the rows of the sum have."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; tensors are read when they are needed."""

    file: Path
    updates: dict[str, Update]
    """Name of the base tensor -> its update."""
    replacements: dict[str, str]
    """Name of the base tensor -> adapter tensor that takes its place (modules_to_save)."""
    tied: bool = False
    """A head that is tied to the embedding stayed so in training (ensure_weight_tying): what replaces one is both."""

    def delta(self, name: str) -> Delta:
        update = self.updates[name]
        a, b = (read_tensor(self.file, key).to(torch.float32) for key in (update.a, update.b))
        rank = a.shape[0]
        scale = update.alpha / (math.sqrt(rank) if update.rank_stabilised else rank)
        if update.magnitudes is not None:
            return Delta(b, a, scale, read_tensor(self.file, update.magnitudes).to(torch.float32))
        return Delta(a.T, b.T, scale) if update.transposed else Delta(b, a, scale)


@dataclass(frozen=True)
class Delta:
    """s B A in float32, in the shape of the base tensor; made by rows, because whole it may outweigh the tensor."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitudes: torch.Tensor | None = None
    """DoRA: of each row of the sum; None: the sum is left as it is."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    def rows(self, rows: slice) -> torch.Tensor:
        return (self.left[rows] @ self.right).mul_(self.scale)

    def onto(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """What these rows of the base tensor, float32, become."""
        change = self.rows(rows)
        if self.magnitudes is None:
            return change.add_(weight)
        change += weight
        norms = torch.linalg.vector_norm(change, dim=1).clamp_(min=LEAST_NORM)
        return change.mul_((self.magnitudes[rows] / norms)[:, None])


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
        raise _unmergeable(folder, reasons, "train a plain LoRA adapter.")
    held = _held(file)
    _refuse_contradictions(folder, config, held)
    updates = {}
    for (module, embedding), sides in held.pairs.items():
        if set(sides) != {"A", "B"}:
            raise ExportRejected(f"the adapter in {folder} is incomplete: {module} has no lora_{'AB'['A' in sides]}.")
        if config.get("use_dora") and (module not in held.magnitudes or embedding or config.get("fan_in_fan_out")):
            raise ExportRejected(
                f"the DoRA adapter in {folder} cannot be merged into its base: {module} "
                + ("has no magnitudes." if module not in held.magnitudes else "is no linear layer.")
            )
        updates[f"{module}.weight"] = Update(
            a=sides["A"],
            b=sides["B"],
            alpha=_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]),
            rank_stabilised=bool(config.get("use_rslora")),
            transposed=embedding or bool(config.get("fan_in_fan_out")),
            magnitudes=held.magnitudes.get(module),
        )
    tied = bool(config.get("ensure_weight_tying"))
    if tied and (both := sorted(name for name in updates if name == HEAD or name.endswith(EMBEDDINGS))):
        reason = f"ensure_weight_tying: the updates of embedding and head are tied ({', '.join(both)})"
        raise _unmergeable(folder, [reason], "train the embedding whole: lora.modules_to_save=[embed_tokens].")
    return Adapter(file, updates, held.replacements, tied)


def _unmergeable(folder: Path, reasons: list[str], instead: str) -> ExportRejected:
    return ExportRejected(
        f"the adapter in {folder} cannot be merged into its base:\n  - " + "\n  - ".join(reasons) + "\n"
        f"Export it as it is with export.formats=[adapter], or {instead}"
    )


@dataclass(frozen=True)
class Held:
    """The tensors of an adapter file by what they are, each with its name there."""

    pairs: dict[tuple[str, bool], dict[str, str]]
    """(module, whether it is an embedding) -> its A and B."""
    ranks: dict[str, int]
    magnitudes: dict[str, str]
    replacements: dict[str, str]
    """See Adapter."""


def _held(file: Path) -> Held:
    held = Held({}, {}, {}, {})
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name = key.removeprefix(PREFIX)
            if match := LORA.match(name):
                held.pairs.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = key
                if match["side"] == "A":
                    held.ranks[match["module"]] = tensors.get_slice(key).get_shape()[0]
            elif name.endswith(MAGNITUDES):
                held.magnitudes[name.removesuffix(MAGNITUDES)] = key
            else:
                # A whole module that was trained, or the base weight of an embedding, which peft saves beside its LoRA.
                held.replacements[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = key
    return held


def _refuse_contradictions(folder: Path, config: dict[str, Any], held: Held) -> None:
    """Raises ExportRejected where the file is not what the config says of it."""
    for module, rank in held.ranks.items():
        if rank != (said := _by_pattern(config.get("rank_pattern") or {}, module, config.get("r"))):
            raise ExportRejected(
                f"the adapter in {folder} contradicts itself: {module} has rank {rank} in adapter_model.safetensors "
                f"and {said} in adapter_config.json, so its scale cannot be known. Take both from the same training."
            )
    saved = {name.rpartition(".")[0] for name in held.replacements}
    whole = config.get("modules_to_save") or []
    if lost := [name for name in whole if not any(f".{module}".endswith(f".{name}") for module in saved)]:
        raise ExportRejected(
            f"the adapter in {folder} is incomplete: it was trained with {', '.join(lost)} whole, and has no such "
            "tensors in adapter_model.safetensors."
        )


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name, as peft reads `alpha_pattern`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
