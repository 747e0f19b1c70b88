"""Is what an endpoint answers what the artifact answered when it was made? Pure.

The recorded answers are greedy and of the very files that are served, so most come back word for word. Where two
tokens are nearly as likely, other kernels decide otherwise and the rest of that answer is another one. So what has to
hold is a mean over the prompts:

    similarity    2 x words in common, in order / words of both (Ratcliff and Obershelp, difflib), 1 when equal

An answer that is equal has to end as the recorded one did: a model that says the right thing and goes on has lost
its stop token.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any

MIN_SIMILARITY = 0.5
"""Mean over the prompts. Measured in docs/serving.md."""
WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")
"""Scripts without spaces go by their characters."""


@dataclass(frozen=True)
class Compared:
    """One prompt. `asked` is its last message."""

    asked: str
    expected: str
    text: str
    similarity: float
    finish_reason: str
    ends_alike: bool | None
    """None: the texts differ, so their ends say nothing."""


def similarity(expected: str, text: str) -> float:
    """1 when the same words follow each other, 0 when there is none in common."""
    ours, theirs = WORDS.findall(expected), WORDS.findall(text)
    if not ours and not theirs:
        return 1.0
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


def compared(recorded: dict[str, Any], answer: dict[str, str]) -> Compared:
    """recorded: an entry of smoke.json; answer: of inference.answer_in."""
    expected, text = recorded["text"].strip(), answer["text"].strip()
    alike = recorded["finish_reason"] == answer["finish_reason"] if expected == text else None
    return Compared(
        str(recorded["messages"][-1].get("content"))[:200], expected, text, round(similarity(expected, text), 3),
        answer["finish_reason"], alike,
    )


def failures(found: list[Compared], least: float = MIN_SIMILARITY) -> list[str]:
    """A sentence for each way in which the served model is not the artifact."""
    said = []
    mean = sum(each.similarity for each in found) / len(found)
    if not mean >= least:
        worst = min(found, key=lambda each: each.similarity)
        said.append(
            f"its answers are not those of the artifact: {mean:.2f} of the words agree over {len(found)} prompts, must "
            f"be at least {least:g} (it says {worst.text[:80]!r} where the artifact said {worst.expected[:80]!r})"
        )
    for each in found:
        if each.ends_alike is False:
            said.append(
                f"the answer {each.text[:80]!r} is the right one and ends with {each.finish_reason!r}, not as it did "
                "when the artifact was made: the stop tokens of generation_config.json are not in use"
            )
    return said


def figures(found: list[Compared]) -> dict[str, Any]:
    """For deployment.json."""
    return {
        "similarity": round(sum(each.similarity for each in found) / len(found), 3),
        "equal": sum(each.ends_alike is not None for each in found),
        "prompts": [asdict(each) for each in found],
    }
