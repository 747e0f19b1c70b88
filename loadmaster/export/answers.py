"""Recorded answers of an export, for an endpoint to be asked later: run_dir/smoke/<format>.json.

They are greedy and the export's own, in bf16 arithmetic, so that whoever serves these very files has to say the same,
but for near ties that another kernel decides otherwise (loadmaster.endpoint.smoke has the tolerance). They are kept
beside the artifact and not in it: it is passed on, pushed to a Hub, baked into an image, and held-out prompts are
somebody's data. The hash of the manifest's file list says which export they are of. Reading them needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadmaster.data import Conversation, prompt_and_reference
from loadmaster.files import read_json, sha256_json, write_json

PROMPTS, ANSWER_TOKENS, LONGEST_PROMPT_TOKENS = 3, 32, 512
FIXED = Conversation([{"role": "user", "content": "What is in the hold?"}], origin="asked of every export")


def recorded_answers(model: Any, tokenizer: Any, conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """{"messages", "prompt_tokens", "text", "tokens", "max_tokens", "finish_reason"} of held-out prompts and FIXED.

    conversations: held out; plain text and those with tools are left out. Empty for a model without a chat template.
    """
    from loadmaster.evaluation.generate import generate_ids, prompt_ids

    if not tokenizer.chat_template:
        return []
    held_out = (prompt for each in conversations if (prompt := _prompt(each, tokenizer)) is not None)
    asked = [*itertools.islice(held_out, PROMPTS), FIXED]
    answers = generate_ids(model, tokenizer, asked, ANSWER_TOKENS, batch_size=1)
    return [
        {
            "messages": conversation.messages, "prompt_tokens": len(prompt_ids(tokenizer, conversation)),
            "text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids), "max_tokens": ANSWER_TOKENS,
            "finish_reason": "stop" if len(ids) < ANSWER_TOKENS else "length",
        }
        for conversation, ids in zip(asked, answers, strict=True)
    ]


def _prompt(conversation: Conversation, tokenizer: Any) -> Conversation | None:
    """The conversation up to its last answer; None where that is no short chat of words alone, or the
    chat template refuses it."""
    from loadmaster.evaluation.generate import is_askable, prompt_ids

    if not conversation.is_words_alone:
        return None
    prompt = replace(conversation, messages=prompt_and_reference(conversation)[0])
    if not is_askable(tokenizer, prompt) or len(prompt_ids(tokenizer, prompt)) > LONGEST_PROMPT_TOKENS:
        return None
    return prompt


def keep(run_dir: Path, manifest: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Write the answers of the export that this manifest describes."""
    told = {"schema": 1, "files": sha256_json(manifest["files"]), "prompts": answers}
    write_json(run_dir / "smoke" / f"{manifest['format']}.json", told)


def kept(run_dir: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of this very export; empty where none are kept, or those of other files."""
    path = run_dir / "smoke" / f"{manifest['format']}.json"
    if not path.is_file():
        return []
    told = read_json(path)
    return told["prompts"] if told["files"] == sha256_json(manifest["files"]) else []
