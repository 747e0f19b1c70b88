"""Merge a LoRA adapter into its base, tensor by tensor: no model class, memory of about one shard.

    W' = W + s B A        s = alpha / r,  or alpha / sqrt(r) with rsLoRA        (A: r x in, B: out x r)

(Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.) DoRA has each row of the sum at its
trained magnitude: W' = m / |W + s B A| (W + s B A), norms by rows (Liu et al. 2024, arXiv 2402.09353). It is taken in
float32 and rounded once, to the dtype of the export, so the only difference from the live adapter is
that one rounding of W'.

A QLoRA adapter was trained against W4 = dequantize(nf4(W)), not W; one over an FP8 base against W8. Merged into W,
the model carries the rounding error W - W4, which the adapter never saw; rounded to 4 bits again, it loses part of the
update. `seen_as` merges into W4 in 16 bits, which is the model that was trained. Which of the two is closer to it is
measured, not assumed (stage.py); `relative_error` has |W - W4| / |s B A| of each layer, which is why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loadmaster.errors import ExportRejected
from loadmaster.export.adapter import Adapter
from loadmaster.export.stream import Change, Unchanged, rewrite, row_chunks
from loadmaster.export.weights import HEAD, WHOLE, Shapes, embedding_name, read_tensor, tensor_files, ties_embeddings
from loadmaster.models.frozen import FORMS
from loadmaster.words import counted


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
