"""Score exported folders against the model as trained, in a process that has nothing of the trainer in it.

    perplexity ratio   exp(mean over tokens of [log p_trained(y) - log p_export(y)])         y: the true next token
    KL                 sum over v of p_trained(v) (log p_trained(v) - log p_export(v)), nats, for each token
    top-1 agreement    share of tokens whose most likely next token is the same
    task metric        of greedy answers to held-out conversations (loadmaster.evaluation)

over the trained tokens of held-out packed rows; equal accuracy can hide changed answers, which KL and
agreement show (Dutta et al. 2024, "Accuracy is not all you need", arXiv 2407.09141).

The distributions are whole, not the top k, so the figures are exact. The trained model goes first and
its log-probabilities stay in host memory in float32 (`held_out_rows` bounds them to 1 GiB); then each
export is loaded alone. So no more than one model is in memory at a time. Every folder is read from disk as
it will be published, and loaded strictly: a missing, unexpected or misshapen tensor is an error.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation, PackedRow, collate
from loadmaster.errors import ExportRejected
from loadmaster.evaluation import run_task
from loadmaster.export.process import progress, read_spec, step, write_result
from loadmaster.export.sidecars import token_ids
from loadmaster.export.weights import tensor_names
from loadmaster.files import read_json
from loadmaster.models.attention import PACKED
from loadmaster.models.forward import trained_logits
from loadmaster.models.load import DTYPES, load_tokenizer, load_trained

REFERENCE_BYTES = 2**30
TOKENIZER_CHECKS = 32


# ----------------------------------------------------------- what is sent to the process


def held_out_rows(rows: Sequence[PackedRow], limit: int, vocabulary_size: int) -> list[dict[str, list[int]]]:
    """The first rows, at most `limit`, cut so that reference log-probabilities stay within REFERENCE_BYTES.

    The cut takes labels away (they become -100), never context: a token is scored with all that precedes it.
    """
    budget = max(1, REFERENCE_BYTES // (4 * vocabulary_size))
    chosen = []
    for index in range(min(limit, len(rows))):
        row = rows[index]
        labels = np.array(row.labels)
        trained = np.flatnonzero(labels != -100)
        labels[trained[budget:]] = -100
        budget -= min(budget, len(trained))
        chosen.append(
            {"input_ids": row.input_ids.tolist(), "labels": labels.tolist(), "position_ids": row.position_ids.tolist()}
        )
        if budget == 0:
            break
    return chosen


@dataclass(frozen=True)
class Candidate:
    """A folder that may become the export of a format. Of several, the one with the lowest mean KL is taken."""

    name: str
    folder: str
    is_adapter: bool = False


def spec(
    *, base: Path, trained: Path, precision: str, nf4: bool, device: str, rows: list[dict[str, list[int]]],
    conversations: Sequence[Conversation], evaluation: EvaluationConfig, trained_task: dict[str, Any] | None,
    formats: dict[str, list[Candidate]],
) -> dict[str, Any]:  # fmt: skip
    """What `python -m loadmaster.export.verify` is told, JSON-able.

    trained_task: run_task's figures of the trained model where they are known; measured again otherwise.
    """
    return {
        "base": str(base), "trained": str(trained), "precision": precision, "nf4": nf4, "device": device,
        "rows": rows, "conversations": [asdict(conversation) for conversation in conversations],
        "evaluation": asdict(evaluation), "trained_task": trained_task,
        "formats": {name: [asdict(candidate) for candidate in found] for name, found in formats.items()},
    }  # fmt: skip


# ----------------------------------------------------------- the figures


@dataclass(frozen=True)
class Reference:
    """The trained model on one packed row: log-probabilities [T, V] in fp32 on the host, and the true tokens [T]."""

    row: PackedRow
    log_probabilities: Tensor
    targets: Tensor


def log_probabilities(model: nn.Module, row: PackedRow, pad_token_id: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits, targets = trained_logits(model, collate([row], pad_token_id))
        return torch.log_softmax(logits.float(), dim=-1), targets


def compare(model: nn.Module, references: Sequence[Reference], pad_token_id: int) -> dict[str, float | int]:
    """The figures of `model` against the references; see the top of the module."""
    losses, trained_losses, divergences, agreements = [], [], [], []
    for reference in references:
        exported, targets = log_probabilities(model, reference.row, pad_token_id)
        trained = reference.log_probabilities.to(exported.device)
        true = targets.to(exported.device).unsqueeze(-1)
        losses.append(-exported.gather(-1, true).squeeze(-1).cpu())
        trained_losses.append(-trained.gather(-1, true).squeeze(-1).cpu())
        agreements.append((exported.argmax(-1) == trained.argmax(-1)).float().cpu())
        divergences.append((trained.exp() * (trained - exported)).sum(-1).cpu())
    loss, trained_loss = (torch.cat(parts).double().mean().item() for parts in (losses, trained_losses))
    divergence = torch.cat(divergences).double()
    return {
        "tokens": len(divergence),
        "perplexity": _exp(loss),
        "trained_perplexity": _exp(trained_loss),
        "perplexity_ratio": _exp(loss - trained_loss),
        "mean_kl": divergence.mean().item(),
        "p99_kl": divergence.quantile(0.99).item(),
        "top1_agreement": torch.cat(agreements).double().mean().item(),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# ----------------------------------------------------------- loading what was published


def load_export(folder: Path, device: str) -> nn.Module:
    """The exported model as a server sees it, in bf16; quantized activations are quantized here too.

    Raises ExportRejected for any tensor that is missing, unexpected, or of another shape.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantized = "quantization_config" in read_json(folder / "config.json")
    quantization = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.bfloat16, device_map={"": device}, attn_implementation=PACKED, use_safetensors=True,
        output_loading_info=True, ignore_mismatched_sizes=True, **quantization,  # named below instead
    )  # fmt: skip
    _refuse_loose_tensors({kind: sorted(map(str, names)) for kind, names in dict(info).items() if names})
    return model.eval()


def load_adapter(base: Path, folder: Path, device: str) -> nn.Module:
    """The exported adapter over the bf16 base, every one of its tensors in use."""
    from peft import get_peft_model_state_dict

    model = load_trained(base, folder, torch.bfloat16, device)
    expected, found = set(get_peft_model_state_dict(model)), set(tensor_names(folder / "adapter_model.safetensors"))
    _refuse_loose_tensors({
        kind: sorted(names)
        for kind, names in {"missing_keys": expected - found, "unexpected_keys": found - expected}.items()
        if names
    })  # fmt: skip
    return model


def _refuse_loose_tensors(problems: dict[str, list[str]]) -> None:
    if problems:
        shown = "; ".join(
            f"{len(names)} {kind.replace('_', ' ')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in problems.items()
        )
        raise ExportRejected(f"its tensors do not fill the model: {shown}")


def check_tokenizer(exported: Any, trained: Any, conversations: Sequence[Conversation]) -> None:
    """Raises ExportRejected where the exported tokenizer and template do not give the tokens of training."""
    for conversation in conversations[:TOKENIZER_CHECKS]:
        if token_ids(exported, conversation) != token_ids(trained, conversation):
            raise ExportRejected(f"its tokenizer or template renders {conversation.origin} otherwise than in training")


# ----------------------------------------------------------- the process


def main(arguments: list[str]) -> None:
    _quiet()
    told = read_spec(arguments)
    tokenizer = load_tokenizer(Path(told["base"]))
    rows = [PackedRow(**{key: np.array(ids) for key, ids in row.items()}, document_ids=[]) for row in told["rows"]]
    conversations = [Conversation(**conversation) for conversation in told["conversations"]]
    evaluation = EvaluationConfig(**told["evaluation"])

    progress("scoring the trained model")
    trained = load_trained(
        Path(told["base"]), Path(told["trained"]), DTYPES[told["precision"]], told["device"], nf4=told["nf4"]
    )
    references = list(_references(trained, rows, tokenizer.pad_token_id))
    trained_task = told["trained_task"]
    if trained_task is None and evaluation.task != "none":
        trained_task = run_task(trained, tokenizer, conversations, evaluation)
    del trained
    _free()

    results = {}
    for name, candidates in told["formats"].items():
        progress(f"verifying {name}")
        results[name] = _verify(
            [Candidate(**candidate) for candidate in candidates], Path(told["base"]), told["device"], references,
            tokenizer, conversations, evaluation, trained_task,
        )  # fmt: skip
    write_result(told, results)


def _references(model: nn.Module, rows: list[PackedRow], pad_token_id: int) -> Iterator[Reference]:
    for row in rows:
        log_p, targets = log_probabilities(model, row, pad_token_id)
        yield Reference(row, log_p.cpu(), targets.cpu())


def _verify(
    candidates: list[Candidate], base: Path, device: str, references: list[Reference], trained_tokenizer: Any,
    conversations: list[Conversation], evaluation: EvaluationConfig, trained_task: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the best candidate of a format, or {"error": why it cannot be used}."""
    start = time.perf_counter()

    def load(candidate: Candidate) -> nn.Module:
        folder = Path(candidate.folder)
        return load_adapter(base, folder, device) if candidate.is_adapter else load_export(folder, device)

    scores: dict[str, dict[str, Any]] = {}
    model = None
    try:
        for candidate in candidates:
            model = None
            _free()
            model = load(candidate)
            scores[candidate.name] = compare(model, references, trained_tokenizer.pad_token_id)
        best = min(candidates, key=lambda candidate: _or_infinite(scores[candidate.name]["mean_kl"]))
        tokenizer = load_tokenizer(Path(best.folder))
        check_tokenizer(tokenizer, trained_tokenizer, conversations)
        figures: dict[str, Any] = {"candidate": best.name, **scores[best.name]}
        if len(candidates) > 1:
            figures["candidates"] = scores
        if evaluation.task != "none":
            if best is not candidates[-1]:
                model = None
                _free()
                model = load(best)
            figures["task"] = run_task(model, tokenizer, conversations, evaluation)
            figures["task"].pop("samples", None)
            if trained_task["metric"] > 0:
                figures["task_retention"] = figures["task"]["metric"] / trained_task["metric"]
    except ExportRejected as error:
        return {"error": str(error)}
    finally:
        model = None
        _free()
    return {**figures, "seconds": time.perf_counter() - start}


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quiet() -> None:
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")


if __name__ == "__main__":
    step(main, sys.argv[1:])
