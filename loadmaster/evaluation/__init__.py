"""Evaluation: held-out loss, greedy answers, task metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation, in_turn, prompt_and_reference
from loadmaster.evaluation.generate import Progress, generate, is_askable, is_spread, prompt_ids
from loadmaster.evaluation.held_out import held_out
from loadmaster.evaluation.tasks import task_metric
from loadmaster.preflight.answers import LONGEST_SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLES
from loadmaster.preflight.verification import ANSWERS_AT_A_TIME
from loadmaster.training.world import World

__all__ = [
    "batch_size", "generate", "held_out", "prompts_and_references", "refuse_unaskable", "run_task", "some_answers",
    "task_metric",
]

LOOKED_AT = 16 * SAMPLES
"""Held-out prompts among which those are looked for that are short enough to be read."""


def run_task(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    evaluation: EvaluationConfig,
    on_progress: Progress | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Answer the held-out conversations and score the answers with `evaluation.task`.

    The last assistant message of a conversation is the reference, what precedes it the prompt; plain text, tool calls,
    answers labelled undesirable and prompts that the chat template refuses alone are left out, and of the rest the
    first `evaluation.max_rows` are answered. Returns the metric's figures ("metric" first) and "samples", a few of
    {"prompt", "reference", "answer", "right"}.
    Raises DataError when no conversation can be scored.
    """
    prompts, references = prompts_and_references(tokenizer, conversations, evaluation.max_rows)
    answers = generate(model, tokenizer, prompts, evaluation.max_new_tokens, batch_size(evaluation), on_progress, world)
    samples = [
        _sample(*asked) | {"right": task_metric(evaluation.task, [asked[2]], [asked[1]])["metric"] == 1.0}
        for asked in islice(zip(prompts, references, answers, strict=True), SAMPLES)
    ]
    return {**task_metric(evaluation.task, answers, references), "samples": samples}


def some_answers(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    evaluation: EvaluationConfig,
    on_progress: Progress | None = None,
    world: World | None = None,
) -> list[dict[str, str]]:
    """A few of {"prompt", "reference", "answer"} to be read, where no task scores answers.

    Of held-out conversations, the first whose prompts differ and are short, of each file in turn. Empty where a model
    has no chat template, and where its weights are spread over GPUs or lie in host memory: all would be moved for each
    token.
    """
    if not tokenizer.chat_template or is_spread(model):
        return []
    different: dict[str, tuple[Conversation, str]] = {}
    for each in zip(*prompts_and_references(tokenizer, in_turn(conversations), LOOKED_AT), strict=True):
        different.setdefault(str(each[0].messages), each)
    short = (each for each in different.values() if len(prompt_ids(tokenizer, each[0])) <= LONGEST_SAMPLE_PROMPT)
    asked = list(islice(short, SAMPLES))
    prompts, longest = [prompt for prompt, _ in asked], min(evaluation.max_new_tokens, SAMPLE_TOKENS)
    answers = generate(model, tokenizer, prompts, longest, batch_size(evaluation), on_progress, world)
    return [_sample(*each, answer) for each, answer in zip(asked, answers, strict=True)]


def refuse_unaskable(tokenizer: Any, evaluation: EvaluationConfig, conversations: Sequence[Conversation]) -> None:
    """Raises DataError where the task metric cannot be had of these held-out conversations: before training."""
    if evaluation.task != "none":
        _, references = prompts_and_references(tokenizer, conversations, evaluation.max_rows)
        task_metric(evaluation.task, references, references)


def prompts_and_references(
    tokenizer: Any, conversations: Iterable[Conversation], limit: int | None
) -> tuple[list[Conversation], list[str]]:
    """What is asked, and the right answer to each: at most `limit` conversations that end in words (None: all), and
    that the chat template takes without them."""
    prompts, references = [], []
    for conversation in conversations:
        if len(prompts) == limit:
            break
        if conversation.text is None and conversation.label is not False:
            messages, reference = prompt_and_reference(conversation)
            prompt = replace(conversation, messages=messages)
            if not reference.get("tool_calls") and is_askable(tokenizer, prompt):
                prompts.append(prompt)
                references.append(reference["content"])
    return prompts, references


def batch_size(evaluation: EvaluationConfig) -> int:
    """Answers generated at a time."""
    return ANSWERS_AT_A_TIME if evaluation.batch_size == "auto" else evaluation.batch_size


def _sample(prompt: Conversation, reference: str, answer: str) -> dict[str, Any]:
    return {"prompt": _shown(prompt), "reference": reference, "answer": answer}


def _shown(prompt: Conversation) -> str:
    """What a reader needs to judge the answer: the turns before it, without the system message."""
    turns = [message for message in prompt.messages if message["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0].get("content"))
    return "\n".join(f"{message['role']}: {message.get('content') or message.get('tool_calls')}" for message in turns)
