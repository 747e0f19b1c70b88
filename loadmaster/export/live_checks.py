"""Checks of an export that need a model in memory, each with a name.

merged_weights     every tensor of a 16-bit export, and every one that a quantized export leaves in 16 bits, is, to the
                   rounding of bf16, what the live model multiplies with:

                       |W_export - (W + s B A)| <= 2^-8 |W + s B A|

                   A base of another model, a wrong scale, a layer that was left out and an untied head all fail,
                   however little they change the predictions. The sum (with DoRA, its rows at their magnitudes) is
                   taken from the live model's own modules,
                   not by the code that merged; what has no module of its own there (experts, which are fused as they
                   are loaded) is the stored base's.
quantized_weights  no matrix of a quantized export is far from the trained one: a broken scale in one layer is, and
                   hardly changes the predictions. Not for AWQ, which moves a factor of each channel from one layer's
                   matrices to those before it on purpose
stops              forced to say a token that ends a turn, generation ends there
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.export import checks
from loadmaster.export.weights import HEAD, read_tensor, tensor_files
from loadmaster.models.buffers import stored_buffers
from loadmaster.models.dora import LEAST_NORM
from loadmaster.models.forward import causal_lm
from loadmaster.models.frozen import FrozenLinear
from loadmaster.models.spread import where_they_lie

ROUNDING = 2.0**-8
"""Of a value: the largest rounding error of bf16, which has 8 bits of significand (just above a power of two it is
2^-8 / (1 + 2^-8)). So the sum must be float32's in full: TF32 rounds each factor of a product by up to 2^-11."""
FLOOR = 2.0**-20
"""Of the largest weight: what the order of a float32 sum may change in an element that cancels to almost nothing."""
QUANTIZED_OTHERWISE = 2e-3
"""Share of the elements of a weight held in few bits that may be beyond that: the live model is quantized on the GPU,
the merge on the CPU, whose sums over the same magnitudes differ in the last bit, and so do a few codes and roundings.
Modelled, by moving the sum over 4 million weights by two bits: 0.00005 of them. A merge into the other base moves most;
a scale 10% off every element whose 4-bit code is zero, one in twelve."""
COMPARED_AT_A_TIME = 2**22
"""Elements."""
PROBES = 8
MAX_WEIGHT_ERROR = {"fp8": 0.2, "gguf": 0.2, "int4": 0.8, "nvfp4": 0.8}
"""By family of formats; a matrix at twice its scale is off by 1, at half by 0.5. SmolLM2-135M after the smoke recipe:
FP8 0.028 at most; INT4 by GPTQ 0.15 in the middle and 0.48 at most, because it moves weights (2026-11-24). A QLoRA
adapter merged into the other base costs 0.09 more."""

FACTORS_MOVE = ("int4_awq",)
"""Formats in which a matrix alone is not the trained one."""


def keeps_matrices(format_name: str) -> bool:
    """Whether it is a quantized format each of whose matrices is, but for rounding, the trained one."""
    return checks.family(format_name) in MAX_WEIGHT_ERROR and format_name not in FACTORS_MOVE


def keeps_plain(format_name: str) -> bool:
    """Whether each tensor that it has in 16 bits is, but for bf16's rounding, the trained one."""
    is_packed = checks.family(format_name) in checks.STORAGE
    return format_name == "bf16" or (is_packed and format_name not in FACTORS_MOVE)


def merged_weights(trained: nn.Module, folders: list[Path], base: Path) -> dict[str, list[str]]:
    """What is wrong with the 16-bit tensors of each folder (by its path), a sentence each: one pass over live weights.

    base: folder of the stored base, for a model trained over 4-bit weights: an export may be the adapter's update on
    either the weights that it was trained over or the stored ones, but must be the same throughout.
    """
    files = {folder: _plain(tensor_files(folder)) for folder in folders}
    stored = tensor_files(base)
    wrong: dict[Path, tuple[list[str], list[str]]] = {folder: ([], []) for folder in folders}
    seen: set[str] = set()
    for name, weight, delta, is_quantized in live_weights(trained):
        seen.add(name)
        if not any(name in held for held in files.values()):
            continue
        as_trained = weight if delta is None else weight + delta
        on_stored = None
        if is_quantized and name in stored:
            plain = read_tensor(stored[name], name).to(as_trained.device, torch.float32)
            on_stored = plain if delta is None else plain + delta
        for folder in folders:
            if name not in files[folder]:
                continue
            found = read_tensor(files[folder][name], name).to(as_trained.device)
            trained_over, over_stored = wrong[folder]
            if not _is_rounded(found, as_trained, QUANTIZED_OTHERWISE if is_quantized else 0.0):
                trained_over.append(name)
            if not _is_rounded(found, as_trained if on_stored is None else on_stored):
                over_stored.append(name)
    if hasattr(trained, "peft_config"):
        # transformers fuses the experts of a mixture as it loads them; an adapter leaves what has no name of its own.
        for folder in folders:
            for name in sorted(files[folder].keys() & stored.keys() - seen):
                found, plain = (read_tensor(each[name], name).float() for each in (files[folder], stored))
                if not _is_rounded(found, plain):
                    for names in wrong[folder]:
                        names.append(name)
        seen |= stored.keys()
    return {
        str(folder): _sentences(min(wrong[folder], key=len), set(files[folder]), seen)
        if seen & set(files[folder])
        else ["none of its tensors has the name of a live weight, so nothing could be compared"]
        for folder in folders
    }


def _plain(files: dict[str, Path]) -> dict[str, Path]:
    """Without what is stored in few bits."""
    return {name: file for name, file in files.items() if f"{name}_scale" not in files}


def live_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None, bool]]:
    """(name as in the base's files, W in float32, what an adapter adds in float32 or None, whether W is in few bits).

    A tied head is named where an adapter or a trained copy makes it differ from the embedding, and by its own name.
    """
    lm = causal_lm(model)
    layers = {name: module for name, module in lm.named_modules() if hasattr(module, "base_layer")}
    saved = {name: module for name, module in lm.named_modules() if hasattr(module, "modules_to_save")}
    inside = tuple(f"{name}." for name in (*layers, *saved))
    with where_they_lie(lm):  # named_parameters() keeps all that it has seen
        names = [name for name, _ in lm.named_parameters() if not name.startswith(inside)]
    for name in stored_buffers(lm):
        layer, _, part = name.rpartition(".")
        yield name, _read(lm.get_submodule(layer), part), None, False
    dtype = lm.get_input_embeddings().weight.dtype
    for name in names:
        layer, _, part = name.rpartition(".")
        module = lm.get_submodule(layer)
        if part == "bias" or not isinstance(module, FrozenLinear):
            yield name, _read(module, part), None, False
        elif part == "weight":  # no adapter is on it; its other parameters are scales of these codes
            weight, is_quantized = _dense(module, dtype)
            yield name, weight, None, is_quantized
    for name, module in saved.items():
        for part, parameter in module.modules_to_save[module.active_adapters[0]].named_parameters():
            yield f"{name}.{part}", parameter.detach().float(), None, False
    for name, module in layers.items():
        weight, is_quantized = _dense(module.get_base_layer(), dtype)
        yield f"{name}.weight", weight, _delta(module, weight), is_quantized
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight:
        yield HEAD, head.weight.detach().float(), None, False


def _dense(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """(what the layer multiplies inputs of `dtype` with, in float32; whether it is held in few bits)."""
    if isinstance(layer, FrozenLinear):
        return layer.multiplied_with(dtype).float(), True
    return _read(layer, "weight"), False


def _read(module: nn.Module, name: str) -> Tensor:
    """A parameter in float32, or a buffer; of a layer that lies elsewhere it is brought. Without numbers nothing is
    compared."""
    parameter = getattr(module, name)
    if parameter.is_meta:
        raise RuntimeError(f"a {type(module).__name__} has no numbers in its {name}: it cannot be compared")
    return parameter.detach().float()


def _delta(module: Any, weight: Tensor) -> Tensor:
    """What peft's layer adds to its weight, float32: s B A; with DoRA, what brings that sum to its magnitudes."""
    adapter = module.active_adapters[0]
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        product = b.detach().float() @ a.detach().float()
        transposed = getattr(module, "fan_in_fan_out", False)
    else:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        product, transposed = b.detach().float() @ a.detach().float(), True
    delta = module.scaling[adapter] * (product.T if transposed else product)
    if not getattr(module, "lora_magnitude_vector", None):
        return delta
    delta += weight
    magnitudes = module.lora_magnitude_vector[adapter].weight.detach().float()
    return delta * (magnitudes / delta.norm(dim=1).clamp(min=LEAST_NORM))[:, None] - weight


def _is_rounded(found: Tensor, exact: Tensor, except_share: float = 0.0) -> bool:
    if found.shape != exact.shape:
        return False
    largest = torch.linalg.vector_norm(exact, torch.inf)
    beyond = 0
    for some, same in zip(found.split(rows := _rows(exact)), exact.split(rows), strict=True):
        allowed = ROUNDING * same.abs() + FLOOR * largest
        beyond += int((~((some.float() - same).abs() <= allowed)).sum())  # NaN is beyond
    return beyond <= except_share * exact.numel()


def _rows(tensor: Tensor) -> int:
    """Rows that are compared at a time: an embedding's copies in float32 would be several times the model's layers."""
    return max(1, COMPARED_AT_A_TIME * len(tensor) // max(1, tensor.numel()))


def _sentences(wrong: list[str], there: set[str], seen: set[str]) -> list[str]:
    if not wrong:
        return []
    compared = len(there & seen)
    what = "is not the weight that was trained" if len(wrong) == 1 else "are not the weights that were trained"
    return [f"{checks.named(wrong)} {what}, beyond bf16's rounding ({len(wrong)} of {compared} tensors)"]


def sketches(model: nn.Module) -> dict[str, Tensor]:
    """Name of each matrix -> its product with a few random vectors, [outputs, PROBES].

    Small enough to keep, and as far from another matrix's, relative to its norm, as the matrices are from each other.
    """
    found = {}
    for name, weight, delta, _ in live_weights(model):
        if weight.dim() == 2:
            exact = weight if delta is None else weight + delta
            probes = torch.randn(exact.shape[1], PROBES, generator=torch.Generator().manual_seed(exact.shape[1]))
            found[name] = (exact @ probes.to(exact.device)).cpu()
    return found


def quantized_weights(model: nn.Module, trained: dict[str, Tensor], limit: float) -> list[str]:
    """Matrices of a loaded quantized export that are further than `limit` from the trained ones.

    trained: `sketches` of the trained model. limit: of |W_export - W| / |W|, Frobenius norm.
    """
    wrong, exported = {}, sketches(model)
    missed = [name for name in trained if name not in exported or exported[name].shape != trained[name].shape]
    if missed:
        return [f"{len(missed)} of {len(trained)} trained matrices are not in it to be compared: {missed[0]}"]
    for name, sketch in trained.items():
        error = float((exported[name] - sketch).norm() / sketch.norm())
        if not error <= limit:
            wrong[name] = error
    if not wrong:
        return []
    worst = sorted(wrong, key=lambda name: -wrong[name])[: checks.NAMED]
    shown = ", ".join(f"{name} by {wrong[name]:.0%}" for name in worst)
    return [f"{len(wrong)} matrices are further than {limit:.0%} from the trained ones: {shown}"]


def stops(model: nn.Module, prompt: list[int], expected: list[int], pad_token_id: int) -> list[str]:
    """Whether the model's own generation settings end a generation at each token of `expected`.

    The token is made the likeliest second one: whatever keeps it from being said, or from being heeded, shows.
    """
    from transformers import LogitsProcessor

    class Wanted(LogitsProcessor):
        def __init__(self, token: int):
            self.token = token

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            at = input_ids.shape[1] - len(prompt)
            scores[:, expected if at != 1 else [t for t in range(scores.shape[1]) if t != self.token]] = -torch.inf
            return scores

    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    deaf = []
    for token in expected:
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
            pad_token_id=pad_token_id, logits_processor=[Wanted(token)],
        )[0, len(prompt) :].tolist()
        if output[1:] != [token]:
            deaf.append(token)
    if not deaf:
        return []
    return [f"generation does not end at token {', '.join(map(str, deaf))}, which ends a turn in training"]
