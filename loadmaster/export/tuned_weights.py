"""Whether the weights of a quantized export carry the fine-tune: the check `tuned_weights`, which needs no predictions.

Of each matrix, W0 is the base's and W1 the trained one, and b() rounds to bf16, from which exports are quantized. The
update is D = W1 - W0, less what of each row lies along b(W1), and W is the exported matrix, dequantized. Then

    share = <W - b(W0), D> / <b(W1) - b(W0), D>        1: the fine-tune is there; 0: the base was exported; 2: it was
                                                       applied twice

Quantization moves a weight by much more than a weak fine-tune does, but not along D: its error is nearly uncorrelated
with D, and a matrix has 10^5 to 10^8 weights to average over. (D itself, and not what bf16 leaves of it, because that
is correlated with the error: bf16 keeps a small update where the weight is small, and INT4 rounds those to zero. Less
what lies along the weights, for quantization shrinks them, which under weight decay would be taken for the update.)
The standard error of the share is taken from the export itself, the larger of

    sqrt(sum over rows i of (<E_i, D_i> - (share - 1) <b(W1)_i - b(W0)_i, D_i>)^2) / <b(W1) - b(W0), D>
    |E| |D| / sqrt(weights) / <b(W1) - b(W0), D>                                           E = W - b(W1)

The first is White's estimator with rows as clusters (Liang and Zeger 1986): rounding one output's weights knows nothing
of another's, while GPTQ makes up for one weight in the others of its row. The second takes the error for white, where
few rows of D are not zero. Measured on SmolLM2-135M, 210 matrices, FP8, INT4 rounded and by GPTQ, updates of 0.02% to
2% of the weights, applied or not: (share - truth) / error has a spread of 0.9 to 1.2 and is 4.1 at most. Figures:
benchmarks/results/2026-11-26_tuned_weights.md.

Shares of several matrices are pooled, with the inverse squares of their errors as weights. A share is judged where its
error is at most TOLD: a matrix by itself, else the matrices of its layer together, and the whole model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.export.checks import named
from loadmaster.export.dequantize import ExportedTensors
from loadmaster.export.live_checks import live_weights
from loadmaster.export.stream import row_chunks
from loadmaster.export.weights import HEAD, read_tensor, tensor_files
from loadmaster.models.forward import causal_lm

ERRORS = 6
"""Standard errors by which a share must miss: one in 10^9, with thousands of matrices and a spread of 1.2."""
HALF = 0.5
"""What the share of a matrix or layer may differ from 1 by: beyond it, it is nearer to the base than to the trained
model, or to the fine-tune applied twice."""
TOLD = HALF / ERRORS
MAX_OFF = {"fp8": 0.05, "gguf": 0.05, "int4": 0.1, "nvfp4": 0.1}
"""By family of formats, for the whole model, beyond its ERRORS. Measured off by: FP8 0.001, GPTQ 0.001, INT4 rounded
0.006, because a group's largest weight is cut to 7 of 7.5 steps and takes its update with it."""
LEAST_ERROR = 1e-3
"""In pooling: so that a tensor that is exact does not speak for all others."""
LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class Share:
    """Of one matrix, or pooled over several."""

    name: str
    share: float
    error: float
    """Standard error."""
    distance: float = 0.0
    """|W - b(W1)|^2."""

    @property
    def is_told(self) -> bool:
        return not self.error > TOLD  # NaN is told, and off

    @property
    def is_off(self) -> bool:
        return not abs(self.share - 1) < HALF


@dataclass(frozen=True)
class Carried:
    """What one folder carries of the fine-tune."""

    shares: list[Share]
    missing: list[str]
    """Matrices that the fine-tune changed and the folder does not hold, or holds so that they cannot be read."""

    def figures(self) -> dict[str, Any]:
        """For the manifest: share and standard_error over all matrices, how many could be told alone, and the least."""
        if not self.shares:
            return {"matrices": 0}
        whole, told = pooled("model", self.shares), [each for each in self.shares if each.is_told]
        figures: dict[str, Any] = {
            "share": whole.share, "standard_error": whole.error, "matrices": len(self.shares), "told_alone": len(told),
        }
        if told:
            least = min(told, key=lambda each: each.share)
            figures["least"] = {"name": least.name, "share": least.share, "standard_error": least.error}
        return figures

    def problems(self, family: str) -> list[str]:
        """A sentence for each way of not being the fine-tuned model, the limits those of a family of formats."""
        found = []
        if self.missing:
            found.append(
                f"{named(self.missing)} {'is' if len(self.missing) == 1 else 'are'} not in it to be compared "
                f"({len(self.missing)} of {len(self.missing) + len(self.shares)} tensors that training changed)"
            )
        judged = list(self._judged())
        if off := [each for each in judged if each.is_off]:
            hold = f"holds {off[0].share:.0%}" if len(off) == 1 else f"hold {pooled('', off).share:.0%}"
            found.append(
                f"{named([each.name for each in off])} {hold} of the fine-tune ({len(off)} of {len(judged)} that can "
                f"be told), must be {1 - HALF:.0%} to {1 + HALF:.0%}: at 0% it was not applied, at 200% twice"
            )
        if self.shares:
            whole, limit = pooled("model", self.shares), MAX_OFF[family]
            if whole.is_told and not abs(whole.share - 1) <= limit + ERRORS * whole.error:
                found.append(
                    f"all matrices together hold {whole.share:.1%} of the fine-tune (standard error {whole.error:.1%}),"
                    f" must be {1 - limit:.0%} to {1 + limit:.0%}: at 0% it was not applied, else its scale is wrong"
                )
        return found

    def _judged(self) -> Iterator[Share]:
        by_layer = defaultdict(list)
        for each in self.shares:
            if each.is_told:
                yield each
            elif layer := LAYER.match(each.name):
                by_layer[layer[1]].append(each)
        for layer, shares in by_layer.items():
            if (together := pooled(f"{layer} ({len(shares)} matrices)", shares)).is_told:
                yield together


def tuned_weights(trained: nn.Module, folders: Sequence[Path], base: Path) -> dict[str, Carried]:
    """What each quantized folder (by its path) carries; one pass over the live weights, a tensor at a time.

    trained: the live model, whose own modules say what it multiplies with. base: folder of the stored base. For a model
    that was trained over 4-bit weights an export may be the update on those or on the stored ones; it is held to the
    one that it is nearer to.
    """
    if not folders:
        return {}
    exports, stored = {folder: ExportedTensors(folder) for folder in folders}, tensor_files(base)
    found: dict[Path, tuple[list[Share], list[Share], list[str]]] = {folder: ([], [], []) for folder in folders}
    lm = causal_lm(trained)
    is_tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for name, weight, delta, is_quantized in live_weights(trained):
        if delta is None and (is_quantized or (is_tied and name == HEAD)):
            continue  # no more than rounded to few bits; judged as the embedding
        own = weight if delta is not None else _stored(stored, name, weight)
        if own is None or (delta is None and torch.equal(own, weight)):
            continue
        after = weight if delta is None else weight + delta
        plain = _stored(stored, name, weight) if is_quantized and delta is not None else None
        for folder, export in exports.items():
            over_own, over_stored, missing = found[folder]
            try:
                exported = export.read(name)
            except Exception:  # the folder may hold anything: what is missing is said by name
                missing.append(name)
                continue
            exported = exported.to(after.device)
            share = share_of(name, exported, own, after)
            other = share if plain is None else share_of(name, exported, plain, plain + delta)
            over_own += [] if share is None else [share]
            over_stored += [] if other is None else [other]
    return {
        str(folder): Carried(min(over_own, over_stored, key=lambda shares: sum(s.distance for s in shares)), missing)
        for folder, (over_own, over_stored, missing) in found.items()
    }


def _stored(files: dict[str, Path], name: str, like: Tensor) -> Tensor | None:
    """The stored base's tensor in float32, where it has one of this name and shape."""
    if name not in files:
        return None
    found = read_tensor(files[name], name).to(like.device, torch.float32)
    return found if found.shape == like.shape else None


def share_of(name: str, found: Tensor, base: Tensor, trained: Tensor) -> Share | None:
    """None where nothing of the fine-tune is left in bf16.

    found, base, trained: float32, of one shape. In slices of rows, so that temporaries stay small.
    """
    if not found.shape == base.shape == trained.shape:
        return Share(name, math.nan, 0.0, math.inf)
    if trained.dim() < 2:
        found, base, trained = (each.reshape(-1, 1) for each in (found, base, trained))
    along, reached, square, distance = [], [], 0.0, 0.0
    for rows in row_chunks(tuple(trained.shape)):
        change, end = trained[rows] - base[rows], trained[rows].bfloat16().float()
        if change[0].numel() > 1:  # a norm or bias is stored as it is
            change -= _along(change, end)
        off = found[rows] - end
        along.append((off * change).flatten(1).sum(1).double())
        reached.append(((end - base[rows].bfloat16().float()) * change).flatten(1).sum(1).double())
        square += float(change.square().sum())
        distance += float(off.square().sum())
    along_rows, reached_rows = torch.cat(along), torch.cat(reached)
    total = float(reached_rows.sum())
    if total <= 0:
        return None
    beyond = float(along_rows.sum()) / total
    by_rows = float((along_rows - beyond * reached_rows).norm()) / total
    white = math.sqrt(max(0.0, distance - beyond**2 * total) / trained.numel() * square) / total
    return Share(name, 1 + beyond, max(by_rows, white), distance)


def _along(change: Tensor, weight: Tensor) -> Tensor:
    """The part of each row of `change` that lies along the weights of that row."""
    dims = tuple(range(1, weight.dim()))
    products = (change * weight).sum(dims, keepdim=True)
    return weight * (products / weight.square().sum(dims, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny))


def pooled(name: str, shares: Sequence[Share]) -> Share:
    """The share of several matrices together."""
    weights = [1 / max(each.error, LEAST_ERROR) ** 2 for each in shares]
    mean = sum(weight * each.share for weight, each in zip(weights, shares, strict=True)) / sum(weights)
    return Share(name, mean, 1 / math.sqrt(sum(weights)))
