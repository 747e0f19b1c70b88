"""Over how many GPUs a server goes for a check, and how many tokens of prompts it takes in one pass. Pure.

    GPUs    the fewest of 1, 2, 4, ... that hold weights, what the server keeps for itself and a request of the longest
            kind (preflight/serving.py) in 0.9 of each card, else in 0.95; where none do, the most that the model can be
            divided over
    tokens  so many that their logits fit in half of what the server leaves of a card, and 1 GiB at most

The log-probabilities of a prompt are taken over the whole vocabulary, for every token of a pass at once, and vLLM
leaves them out where it divides a card between weights, activations and cache (its issue 5907): 8,192 tokens, its
default on an H100, of a vocabulary of 152,000 are 7.5 GB at least, and its own share of the card (0.92) leaves 6.8 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.export.thresholds import FAMILIES
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.serving import UTILISATION, plan_serving
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tensor_parallel import divides

SHARES = (UTILISATION, 0.95)
"""Of a card that the server may take, in the order in which they are tried."""
FEWEST_TOKENS, MOST_TOKENS = 256, 2048
LOGIT_BYTES = 12
"""Of a token and an entry of the vocabulary: logits in 16 bits, gathered from other cards once more, log-probabilities
in fp32, and what ranks them. A judgement, on the safe side of 9."""


@dataclass(frozen=True)
class Division:
    """How a server is put on the machine; gpus: None on a machine without any."""

    gpus: int | None
    tokens: int
    share: float = UTILISATION

    def arguments(self, max_model_len: int) -> list[str]:
        """For vLLM's command line. A prompt of more tokens than a pass takes is cut into several passes."""
        found = ["--max-num-batched-tokens", str(self.tokens)]
        if self.tokens < max_model_len:
            found.append("--enable-chunked-prefill")
        if self.gpus is not None:
            found += ["--gpu-memory-utilization", str(self.share)]
        if self.gpus is not None and self.gpus > 1:
            found += ["--tensor-parallel-size", str(self.gpus)]
        return found


def division(
    shape: ModelShape, config: dict[str, Any], form: str, weights: float, context: int, machine: Hardware
) -> Division:
    """Where a model of this shape is served.

    config: config.json of the folder that is served; form: of its weights, as export.formats names it. weights: bytes
    of all that is loaded. context: tokens of the longest request.
    """
    if machine.is_cpu:
        return Division(None, tokens_at_a_time(shape.vocabulary_size, GIB))
    counts = list(counts_over(shape, scale_block(config), machine.count))
    form = FAMILIES.get(form, form)

    def over(count: int, share: float) -> Division:
        left = (1 - share) * machine.memory_gib * GIB
        return Division(count, tokens_at_a_time(shape.vocabulary_size, min(GIB, left / 2)), share)

    for share in SHARES:
        for count in counts:
            cards = replace(machine, count=count)
            if plan_serving(shape, cards, form, context, utilisation=share, checkpoint_bytes=weights).fits:
                return over(count, share)
    return over(counts[-1], SHARES[-1])


def counts_over(shape: ModelShape, block: int, most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`, as far as vLLM divides the model over so many."""
    count = 1
    while count <= most:
        if divides(shape, count, block):
            yield count
        count *= 2


def tokens_at_a_time(vocabulary: int, room: float) -> int:
    """Tokens of a pass whose logits fit into so many bytes, in steps of 64."""
    tokens = int(room / (LOGIT_BYTES * vocabulary)) // 64 * 64
    return min(max(tokens, FEWEST_TOKENS), MOST_TOKENS)


def scale_block(config: dict[str, Any]) -> int:
    """Weights along a matrix's inputs that share a scale; 1 where a whole row does."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    schemes = [group.get("weights") or {} for group in groups.values()]
    sizes = [scheme.get("group_size") or (scheme.get("block_structure") or [1])[-1] for scheme in schemes]
    return max([1, *sizes])
