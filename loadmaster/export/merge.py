"""Merge a LoRA adapter into its base, tensor by tensor: no model class, memory of about one shard.

    W' = W + s B A        s = alpha / r,  or alpha / sqrt(r) with rsLoRA        (A: r x in, B: out x r)

(Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.) DoRA has each row of the sum at its
trained magnitude: W' = m / |W + s B A| (W + s B A), norms by rows (Liu et al. 2024, arXiv 2402.09353). It is taken in
float32 and rounded once, to the dtype of the export, so the only difference from the live adapter is
that one rounding of W'. peft's layout: `adapter_config.json` and `adapter_model.safetensors` with
`base_model.model.<module>.lora_A.weight`; embeddings have `lora_embedding_A` (r x vocabulary) and
`lora_embedding_B` (dim x r), whose update is s (B A)^T.

What cannot be written as a sum onto one weight is refused, by name: biases, initialisations that changed the base.

A QLoRA adapter was trained against W4 = dequantize(nf4(W)), not W; one over an FP8 base against W8. Merged into W,
the model carries the rounding error W - W4, which the adapter never saw; rounded to 4 bits again, it loses part of the
update. `seen_as` merges into W4 in 16 bits, which is the model that was trained. Which of the two is closer to it is
measured, not assumed (stage.py); `relative_error` has |W - W4| / |s B A| of each layer, which is why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loadmaster.errors import ExportRejected
from loadmaster.export.stream import Change, Unchanged, rewrite, row_chunks
from loadmaster.export.weights import (
    EMBEDDINGS,
    HEAD,
    WHOLE,
    Shapes,
    embedding_name,
    read_tensor,
    tensor_files,
    ties_embeddings,
)
from loadmaster.files import read_json
from loadmaster.models.dora import LEAST_NORM
from loadmaster.models.frozen import FORMS
from loadmaster.words import counted

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


@dataclass(frozen=True)
class MergeReport:
    merged_tensors: int
    replaced_tensors: int
    relative_update: float
    """Norm of all updates over the norm of the weights they were added to: 0 is an adapter that does nothing."""
    tied_embeddings: bool
    """Whether the merged model still shares embedding and head; config.json must say the same."""
    relative_error: dict[str, float]
    """Of each merged tensor that training saw quantized or rounded: norm of that error over the update's."""


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


def merge(
    base: Path,
    target: Path | None,
    adapter: Adapter | None,
    dtype: torch.dtype,
    seen_as: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    also: Mapping[Path, Change] | None = None,
) -> MergeReport:
    """Write the weights of `base` with `adapter` merged in to `target`, shard by shard.

    dtype: of the floating-point tensors written.
    seen_as: gives the base weight of a name as training saw it (`round_trip`); None: as it is stored.
    also: folders for the merged tensors changed further (quantized), in the same pass; then `target` may be None.
    An adapter on one of a tied embedding and head unties them: the other keeps the base weight, as it does
    in training. Where training kept them tied, they are one in the merged model too.
    Raises ExportRejected for an adapter that is not of this base, or that is not finite.
    """
    adapter = adapter or Adapter(Path(), {}, {})
    change = Merge(base, adapter, dtype, seen_as)
    rewrite(base, change, {**({target: Unchanged()} if target else {}), **(also or {})})
    return MergeReport(
        merged_tensors=len(adapter.updates),
        replaced_tensors=len(adapter.replacements),
        relative_update=math.sqrt(change.update / change.weight) if change.weight else 0.0,
        tied_embeddings=change.tied_embeddings and not change.untie,
        relative_error=change.relative_error,
    )


class Merge:
    """For `stream.rewrite`: each base tensor with its update, in the dtype of the export."""

    def __init__(
        self, base: Path, adapter: Adapter, dtype: torch.dtype,
        seen_as: Callable[[str, torch.Tensor], torch.Tensor] | None,
    ):
        self.adapter, self.dtype, self.seen_as = adapter, dtype, seen_as
        names = tensor_files(base)
        self.tied_embeddings = ties_embeddings(base)
        self.embedding = embedding_name(names)
        touched = adapter.updates.keys() | adapter.replacements.keys()
        if adapter.tied and self.tied_embeddings:  # peft saves the one weight under both names
            touched -= {HEAD}
        self.untie = self.tied_embeddings and not adapter.tied and bool({HEAD, self.embedding} & touched)
        # A tied base may leave the head out of its files, or carry a copy that is never read.
        known = (names.keys() - {HEAD} if self.tied_embeddings else names.keys()) | ({HEAD} if self.untie else set())
        if unknown := sorted(touched - known):
            raise ExportRejected(
                f"the adapter changes {counted(len(unknown), 'tensor')} that {base} does not have "
                f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}): trained on another base, "
                "or on modules that cannot be merged."
            )
        self.update = self.weight = 0.0
        self.relative_error: dict[str, float] = {}

    def _names(self, name: str) -> list[str]:
        """What a base tensor is written as."""
        if name == HEAD and self.tied_embeddings:
            return []
        return [name, HEAD] if self.untie and name == self.embedding else [name]

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Shapes:
        stored = self.dtype if dtype.is_floating_point else dtype
        return dict.fromkeys(self._names(name), (stored, shape))

    def tensors(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for new in self._names(name):
            yield new, self._merged(new, weight)

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        stored = self.dtype if weight.is_floating_point() else weight.dtype
        base = weight
        if name in self.adapter.replacements:
            weight = read_tensor(self.adapter.file, self.adapter.replacements[name])
            _refuse_other_shape(name, weight.shape, base.shape)
            _refuse_not_finite(name, weight)
        elif self.seen_as is not None:
            weight = self.seen_as(name, weight)
        if name not in self.adapter.updates:
            return weight.to(stored)
        delta = self.adapter.delta(name)
        _refuse_other_shape(name, delta.shape, base.shape)
        if delta.magnitudes is not None:
            _refuse_other_shape(f"magnitudes of {name}", delta.magnitudes.shape, base.shape[:1])
        merged = torch.empty(base.shape, dtype=stored)
        update = error = 0.0
        for rows in row_chunks(tuple(base.shape)):
            exact = weight[rows].to(torch.float32)
            added = delta.onto(exact, rows)
            _refuse_not_finite(name, added)
            update += float((added - exact).square().sum())
            self.weight += float(exact.square().sum())
            error += 0.0 if weight is base else float((base[rows].to(torch.float32) - exact).square().sum())
            merged[rows] = added
        self.update += update
        if error and update:
            self.relative_error[name] = math.sqrt(error / update)
        return merged


def round_trip(form: str | None, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """For `merge`: the base weights as training multiplied with them.

    form: of the frozen base, nf4 or fp8 (loadmaster.models.frozen); None where it is not quantized. dtype: the one that
    training computed in; a base that is stored in a finer one (float32, or float16 beside bf16) was rounded to it.
    Embeddings, head and norms are not quantized.
    """

    def seen(name: str, weight: torch.Tensor) -> torch.Tensor:
        if form is None or weight.dim() != 2 or name.endswith(WHOLE):
            is_finer = weight.is_floating_point() and torch.finfo(weight.dtype).eps < torch.finfo(dtype).eps
            return weight.to(dtype) if is_finer else weight
        layer = FORMS[form](weight.shape[1], weight.shape[0])
        layer.fill(weight.to(dtype))
        return layer.multiplied_with(dtype)

    return seen


def _refuse_other_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise ExportRejected(
            f"the adapter's {name} has shape {tuple(shape)}, the base's {tuple(expected)}: "
            "it was trained on another base, or on a larger vocabulary."
        )


def _refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ExportRejected(
            f"the adapter's {name} holds NaN or infinity: training diverged. "
            "Resume from an earlier checkpoint, with a lower optimizer.lr."
        )


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name, as peft reads `alpha_pattern`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
