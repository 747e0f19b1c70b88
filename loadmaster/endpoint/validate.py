"""Does a deployed endpoint serve the artifact, as fast as it was planned? Asked through the API that its users have.

1. the recorded prompts, as jobs: the right model, the recorded words and ends (smoke.py)
2. a model that does not exist, which must be refused
3. a short load of streams, timed and put beside what the serving plan expects of it (endpoint/load_test.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from loadmaster.endpoint.inference import CHAT, Inference, Load, NotAnswered, answer_in, loads
from loadmaster.endpoint.smoke import compared, failures, figures

WARM_S = 120.0
"""For an answer of a worker that is up."""
NETWORK_S = 1.0
"""Of a first token, for the way there and back and the platform's queue; on top of what is planned."""
NO_SUCH_MODEL = "loadmaster-no-such-model"
GREETING = [{"role": "user", "content": "Hello"}]
GREETING_TOKENS = 64


@dataclass(frozen=True)
class Expected:
    """What the bundle says of the endpoint."""

    model: str
    context: int
    smoke: list[dict[str, Any]]
    """Prompts of smoke.json; empty: nothing is recorded (an export of an earlier version, or no chat template)."""
    load: dict[str, Any]
    """LoadTest as serving.json has it."""
    max_slowdown: float


def validate(
    inference: Inference, expected: Expected, start_s: float, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """Figures for deployment.json. start_s: what the first worker may take to start. Raises NotAnswered."""
    echo(f"asking; the first worker may take up to {start_s:.0f} s to start")
    found = _asked(inference, expected, start_s, echo)
    wrong = _job(expected, [*GREETING], 1) | {"model": NO_SUCH_MODEL}
    try:
        inference.ask({"openai_route": CHAT, "openai_input": wrong}, WARM_S)
    except NotAnswered:
        pass
    else:
        raise NotAnswered(f"it answers as {NO_SUCH_MODEL!r}, a model that does not exist, so its name means nothing")
    planned = expected.load
    sent = loads(
        {"model": expected.model}, planned["requests"], planned["prompt_tokens"], planned["output_tokens"]
    )
    load = inference.load(sent, planned["at_once"])
    echo(
        f"first token after {1000 * load.first_token_s:,.0f} ms (planned {1000 * planned['first_token_s']:,.0f}), "
        f"{load.tokens_per_second_each:,.0f} tokens/s an answer (planned {planned['tokens_per_second_each']:,.0f}), "
        f"{load.tokens_per_second:,.0f} in all with {load.at_once} at once"
    )
    if slow := too_slow(load, planned, expected.max_slowdown):
        raise NotAnswered("; ".join(slow))
    return {"smoke": found, "measured": asdict(load), "planned": planned, "max_slowdown": expected.max_slowdown}


def _asked(inference: Inference, expected: Expected, start_s: float, echo: Callable[[str], None]) -> dict[str, Any]:
    if not expected.smoke:
        echo("no answers are recorded in the export, so what it says is not compared; export again to have them")
    prompts = expected.smoke or [{"messages": GREETING, "max_tokens": min(GREETING_TOKENS, expected.context // 4)}]
    wait_s, compare = start_s, []
    for prompt in prompts:
        body = _job(expected, prompt["messages"], max(1, prompt["max_tokens"]))
        answer = answer_in(inference.ask({"openai_route": CHAT, "openai_input": body}, wait_s))
        wait_s = WARM_S
        if answer["model"] != expected.model:
            raise NotAnswered(f"it serves {answer['model']!r}, not {expected.model!r}")
        if answer["finish_reason"] not in ("stop", "length"):
            raise NotAnswered(f"the answer ended with {answer['finish_reason']!r}, not with stop or length")
        if not answer["text"] and prompt.get("text") != "":
            raise NotAnswered("the answer has no text")
        if expected.smoke:
            compare.append(compared(prompt, answer))
    if not compare:
        return {"prompts": [{"text": answer["text"], "finish_reason": answer["finish_reason"]}]}
    result = figures(compare)
    echo(f"{result['equal']} of {len(compare)} answers are word for word the artifact's, {result['similarity']:.0%} of "
         "their words agree")
    if said := failures(compare):
        raise NotAnswered("; ".join(said))
    return result


def too_slow(load: Load, planned: dict[str, Any], max_slowdown: float) -> list[str]:
    """A sentence for each figure that is more than max_slowdown times worse than planned."""
    said = []
    remedy = f"; endpoint.max_slowdown={max_slowdown:g} is the limit, --keep leaves it up to be looked at"
    limit = max_slowdown * planned["first_token_s"] + NETWORK_S
    if load.first_token_s > limit:
        said.append(
            f"the first token comes after {load.first_token_s:.2f} s, planned {planned['first_token_s']:.2f} s and "
            f"accepted up to {limit:.2f} s{remedy}"
        )
    least = planned["tokens_per_second_each"] / max_slowdown
    if load.tokens_per_second_each < least:
        said.append(
            f"an answer comes at {load.tokens_per_second_each:,.1f} tokens/s, planned "
            f"{planned['tokens_per_second_each']:,.1f} and accepted down to {least:,.1f}{remedy}"
        )
    return said


def _job(expected: Expected, messages: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Greedy, and no setting of generation_config.json that would make it another answer."""
    return {
        "model": expected.model, "messages": messages, "max_tokens": most, "temperature": 0,
        "repetition_penalty": 1.0,
    }
