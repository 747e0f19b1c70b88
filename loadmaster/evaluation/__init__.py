"""Evaluation: held-out loss, greedy answers, task metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation
from loadmaster.evaluation.generate import Progress, generate, without_answer
from loadmaster.evaluation.held_out import held_out
from loadmaster.evaluation.tasks import task_metric

__all__ = ["generate", "held_out", "run_task", "task_metric"]

SAMPLES = 8
AUTO_BATCH_SIZE = 16


def run_task(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    evaluation: EvaluationConfig,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer the held-out conversations and score the answers with `evaluation.task`.

    The last message of a conversation is the reference; those that do not end with text from the assistant
    (plain text, tool calls) are left out. Returns the metric's figures ("metric" first) and "samples", the first
    few as {"prompt", "reference", "answer", "right"}. Returns {} when the task is none.
    Raises DataError when no conversation can be scored.
    """
    if evaluation.task == "none":
        return {}
    scored = [conversation for conversation in conversations if _has_answer(conversation)][: evaluation.max_rows]
    references = [conversation.messages[-1]["content"] for conversation in scored]
    batch_size = AUTO_BATCH_SIZE if evaluation.batch_size == "auto" else evaluation.batch_size
    prompts = [without_answer(conversation) for conversation in scored]
    answers = generate(model, tokenizer, prompts, evaluation.max_new_tokens, batch_size, on_progress)
    samples = [
        {
            "prompt": _shown(prompt),
            "reference": reference,
            "answer": answer,
            "right": task_metric(evaluation.task, [answer], [reference])["metric"] == 1.0,
        }
        for prompt, reference, answer in list(zip(prompts, references, answers, strict=True))[:SAMPLES]
    ]
    return {**task_metric(evaluation.task, answers, references), "samples": samples}


def _has_answer(conversation: Conversation) -> bool:
    last = conversation.messages[-1] if conversation.messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


def _shown(prompt: Conversation) -> str:
    """What a reader needs to judge the answer: the turns before it, without the system message."""
    turns = [message for message in prompt.messages if message["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0].get("content"))
    return "\n".join(f"{message['role']}: {message.get('content') or message.get('tool_calls')}" for message in turns)
