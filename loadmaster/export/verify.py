"""Score exported folders against the model as trained, in a process that has nothing of the trainer in it.

Every folder is read from disk as it will be published. What can be told from its files is checked first
(`loadmaster.export.checks`), then it is loaded strictly and held against the live model (`live_checks`), scored on the
trained tokens of held-out packed rows, and asked held-out prompts (`figures` has the formulas).

The distributions are whole, not the top k, so the figures are exact. The trained model goes first and
its log-probabilities stay in host memory in float32 (`held_out_rows` bounds them to 1 GiB); then each
export is loaded alone. So no more than one model is in memory at a time. One that the first GPU does not hold is spread
over all, then over host memory and disk (`loadmaster.models.spread`).

A frozen FP8 base is scored as it is held, its inputs not rounded to FP8 as a GPU's units round them in training: no
export has that rounding but FP8's, whose limits allow for it. What it moves is a figure of its own.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loadmaster import collector

if __name__ == "__main__":  # before what takes long to import
    collector.pause()

import numpy as np
import torch
from torch import Tensor, nn

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation, PackedRow, stop_token_ids
from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.evaluation import batch_size, generate, prompts_and_references, task_metric
from loadmaster.evaluation.generate import prompt_ids
from loadmaster.evaluation.mode import evaluating
from loadmaster.export import checks, live_checks
from loadmaster.export.answers import recorded_answers
from loadmaster.export.figures import (
    Reference,
    compare,
    flipped,
    log_probabilities,
    true_token_log_probabilities,
)
from loadmaster.export.loading import load_adapter, load_export, refuse_torn
from loadmaster.export.process import progress, read_spec, step, write_result
from loadmaster.export.room import spread_over
from loadmaster.export.tuned_weights import tuned_weights
from loadmaster.export.weights import is_adapter
from loadmaster.models.attention import cached_attention
from loadmaster.models.frozen import round_inputs, rounds_inputs
from loadmaster.models.language_model import by_names_of, for_whole
from loadmaster.models.load import DTYPES, load_base, load_trained
from loadmaster.models.spread import NoRoom, free_device_memory
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.out_of_memory import ran_out
from loadmaster.preflight.verification import ANSWER_TOKENS, ANSWERS, REFERENCE_BYTES

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
    is_baseline: bool = False
    """Scored for comparison, never taken."""


def spec(
    *, base: Path | str, trained: Path | str, precision: str, frozen: str | None, device: str,
    rows: list[dict[str, list[int]]],
    conversations: Sequence[Conversation], evaluation: EvaluationConfig, formats: dict[str, list[Candidate]],
    scratch: Path | str | None = None, working: float = 0.0, passing: float = 0.0,
) -> dict[str, Any]:
    """What `python -m loadmaster.export.verify` is told, JSON-able; the last three as in `room.spread_over`."""
    return {
        "scratch": None if scratch is None else str(scratch), "working": working, "passing": passing,
        "base": str(base), "trained": str(trained), "precision": precision, "frozen": frozen, "device": device,
        "rows": rows, "conversations": [asdict(conversation) for conversation in conversations],
        "evaluation": asdict(evaluation),
        "formats": {name: [asdict(candidate) for candidate in found] for name, found in formats.items()},
    }


# ----------------------------------------------------------- the process


def main(arguments: list[str]) -> None:
    _quiet()
    told = read_spec(arguments)
    formats = {name: [Candidate(**each) for each in found] for name, found in told["formats"].items()}
    verification = Verification(told, formats)
    results = {}
    for name, candidates in formats.items():
        progress(f"verifying {name}")
        results[name] = verification.of(name, candidates)
    write_result(told, results)


class Verification:
    """The trained model's side of every comparison, made once; the model itself is gone when this is made."""

    def __init__(self, told: dict[str, Any], formats: dict[str, list[Candidate]]):
        torch.set_float32_matmul_precision("highest")  # whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE asks for
        self.base, scratch = Path(told["base"]), told["scratch"]
        self.tokenizer = load_tokenizer(self.base)
        scored = sum(label != -100 for row in told["rows"] for label in row["labels"])
        self.spread = spread_over(
            told["device"], scratch and Path(scratch), told["working"], told["passing"],
            4.0 * len(self.tokenizer) * scored,
        )
        self.conversations = [Conversation(**conversation) for conversation in told["conversations"]]
        self.evaluation = EvaluationConfig(**told["evaluation"])
        self.stop_ids = stop_token_ids(self.tokenizer)
        self.prompts, self.right_answers = self._asked()
        rows = [PackedRow(**{key: np.array(ids) for key, ids in row.items()}, document_ids=[]) for row in told["rows"]]
        self.trained = Path(told["trained"])
        self.trained_checks = {"lora_rows": checks.lora_rows(self.trained)}

        progress("scoring the trained model")
        how: dict[str, Any] = {"dtype": DTYPES[told["precision"]], "device": self.spread, "frozen": told["frozen"]}
        model = load_trained(self.base, self.trained, **how)
        round_inputs(model, False)
        self._say_where()
        self._take_down(model, rows, formats)
        if hasattr(model, "disable_adapter"):
            without = model.disable_adapter()
        else:
            del model
            free_device_memory()
            model, without = load_base(self.base, **how).eval(), nullcontext()
        with without:
            of_base = [true_token_log_probabilities(model, row, self.tokenizer.pad_token_id) for row in rows]
        self.references = [replace(known, base=own) for known, own in zip(self.references, of_base, strict=True)]
        del model
        free_device_memory()

    def _take_down(self, model: nn.Module, rows: list[PackedRow], formats: dict[str, list[Candidate]]) -> None:
        """What the trained model says, and of its weights what those of `formats` are held against."""
        pad = self.tokenizer.pad_token_id
        self.references = [Reference(row, *map(Tensor.cpu, log_probabilities(model, row, pad))) for row in rows]
        self.rounding = _rounding_figures(model, self.references, pad)
        self.answers = self._answers(model, self.tokenizer)
        self.sketches = live_checks.sketches(model)
        self.merged_weights = live_checks.merged_weights(model, _whole(formats, live_checks.keeps_plain), self.base)
        self.tuned_weights = tuned_weights(model, _whole(formats, live_checks.keeps_matrices), self.base)

    def of(self, name: str, candidates: list[Candidate]) -> dict[str, Any]:
        """Figures of the best candidate of a format; "error" says why a folder cannot be used at all.

        "checks" has the sentences of each named check: an empty list has passed.
        """
        start = time.perf_counter()
        found: dict[str, list[str]] = {}
        model = None
        try:
            scores: dict[str, dict[str, Any]] = {}
            tokenizers: dict[str, Any] = {}
            for candidate in candidates:
                model = None
                free_device_memory()
                found = self._file_checks(name, Path(candidate.folder))
                tokenizers[candidate.name] = _tokenizer(Path(candidate.folder))
                model = self._load(candidate)
                scores[candidate.name] = compare(model, self.references, self.tokenizer.pad_token_id)
                scores[candidate.name] |= self._answer_figures(model, tokenizers[candidate.name])
                if carried := self.tuned_weights.get(candidate.folder):
                    scores[candidate.name]["tuned_weights"] = carried.figures()
            eligible = [candidate for candidate in candidates if not candidate.is_baseline]
            best = min(eligible, key=lambda candidate: _or_infinite(scores[candidate.name]["mean_kl"]))
            if best is not candidates[-1]:
                model = None
                free_device_memory()
                found = self._file_checks(name, Path(best.folder))
                model = self._load(best)
            figures: dict[str, Any] = {"candidate": best.name, **scores[best.name]}
            if len(candidates) > 1:
                figures["candidates"] = scores
            if self.rounding:
                figures["activation_rounding"] = self.rounding
            tokenizer = tokenizers[best.name]
            live = self._live_checks(name, Path(best.folder), model, tokenizer)
            figures["checks"] = {"strict_load": [], **found, **live}
            figures["smoke"] = recorded_answers(model, tokenizer, self.conversations)
        except ExportRejected as error:
            return {"error": str(error), "checks": found}
        finally:
            model = None
            free_device_memory()
        return {**figures, "seconds": time.perf_counter() - start}

    def _file_checks(self, name: str, folder: Path) -> dict[str, list[str]]:
        try:
            refuse_torn(folder)
        except ExportRejected as error:
            raise ExportRejected(f"strict_load: {error}") from None
        found = {
            **self.trained_checks,
            "storage": checks.storage(folder, name),
            "finite": checks.finite(folder),
            "stop_tokens": checks.stop_tokens(folder, self.base, self.stop_ids),
        }
        if is_adapter(folder):
            found["lora_rows"] = checks.lora_rows(folder)
            with by_names_of(self.base, self.trained, for_whole) as trained:
                found["as_trained"] = checks.as_trained(folder, trained)
        return found

    def _load(self, candidate: Candidate) -> nn.Module:
        folder = Path(candidate.folder)
        try:
            if candidate.is_adapter:
                model = load_adapter(self.base, folder, self.spread)
            else:
                model = load_export(folder, self.spread)
        except Exception as error:  # the folder may hold anything, and no error of loading it is the trainer's
            if isinstance(error, NoRoom) or ran_out(error):  # say nothing of the folder
                raise
            raise ExportRejected(f"strict_load: {error}") from None
        self._say_where()
        return model

    def _say_where(self) -> None:
        if not self.spread.placement.is_whole:
            progress(self.spread.placement.words(self.spread.main != "cpu"))

    def _live_checks(self, name: str, folder: Path, model: nn.Module, tokenizer: Any) -> dict[str, list[str]]:
        found = {"template": checks.template(tokenizer, self.tokenizer, self.conversations)}
        if live_checks.keeps_matrices(name):
            family = checks.family(name)
            limit = live_checks.MAX_WEIGHT_ERROR[family]
            found["quantized_weights"] = live_checks.quantized_weights(model, self.sketches, limit)
            if carried := self.tuned_weights.get(str(folder)):
                found["tuned_weights"] = carried.problems(family)
        if str(folder) in self.merged_weights:
            found["merged_weights"] = self.merged_weights[str(folder)]
        if self.tokenizer.chat_template:
            prompt = prompt_ids(self.tokenizer, Conversation(checks.ONE_TURN))
            with evaluating(model), cached_attention(model):
                found["stops"] = live_checks.stops(model, prompt, self.stop_ids, self.tokenizer.pad_token_id)
        return found

    # ------------------------------------------------------------- greedy answers

    def _asked(self) -> tuple[list[Conversation], list[str]]:
        """Held-out prompts and, for a task, their right answers."""
        if not self.tokenizer.chat_template:
            return [], []
        if self.evaluation.task != "none":
            return prompts_and_references(self.tokenizer, self.conversations, self.evaluation.max_rows)
        return prompts_and_references(self.tokenizer, self.conversations, ANSWERS)[0], []

    def _answers(self, model: nn.Module, tokenizer: Any) -> list[str]:
        longest = self.evaluation.max_new_tokens
        if self.evaluation.task == "none":
            longest = min(longest, ANSWER_TOKENS)
        return generate(model, tokenizer, self.prompts, longest, batch_size(self.evaluation)) if self.prompts else []

    def _answer_figures(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        if not self.prompts:
            return {}
        answers = self._answers(model, tokenizer)
        figures: dict[str, Any] = {"answers": len(answers), "flipped_answers": flipped(answers, self.answers)}
        if self.right_answers:
            task = self.evaluation.task
            figures["task"] = task_metric(task, answers, self.right_answers)
            trained = task_metric(task, self.answers, self.right_answers)["metric"]
            if trained > 0:
                figures["task_retention"] = figures["task"]["metric"] / trained
        return figures


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except LoadmasterError as error:  # no fault of the machine, which this kind of error would say
        raise ExportRejected(f"strict_load: {error}") from None


def _rounding_figures(model: nn.Module, references: list[Reference], pad_token_id: int) -> dict[str, Any]:
    """What rounding inputs to FP8, as in training, moves of the references; empty where they are not rounded."""
    if not rounds_inputs(model):
        return {}
    round_inputs(model, True)
    figures = compare(model, references, pad_token_id)
    round_inputs(model, False)
    return {key: figures[key] for key in ("perplexity_ratio", "mean_kl", "p99_kl", "top1_agreement")}


def _whole(formats: dict[str, list[Candidate]], is_held: Callable[[str], bool]) -> list[Path]:
    """Folders of the formats that are held, each once, but for torn ones."""
    folders = [Path(each.folder) for name, found in formats.items() if is_held(name) for each in found]
    return [folder for folder in dict.fromkeys(folders) if not _is_torn(folder)]


def _is_torn(folder: Path) -> bool:
    try:
        refuse_torn(folder)
    except ExportRejected:
        return True
    return False


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _quiet() -> None:
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")


if __name__ == "__main__":
    step(main, sys.argv[1:])
