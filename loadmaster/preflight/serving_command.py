"""`loadmaster plan-serving model=NAME format=int4 gpu=l40s ...`: would it serve, how many at once, for how much."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loadmaster import catalog
from loadmaster.config.fields import choices, describe, nearest, nearest_card, written
from loadmaster.config.fields import fields as fields_of
from loadmaster.config.schema import CLOSED, Auto, FractionBelowOne, PositiveFloat, PositiveInt
from loadmaster.errors import ConfigError, DoesNotFit, Problem
from loadmaster.files import as_object
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.families import quantized_by
from loadmaster.preflight.hardware import from_catalog, rentable
from loadmaster.preflight.serving import (
    UTILISATION,
    ServingPlan,
    cheapest_servers,
    machines_for,
    plan_serving,
    refuse_other_caches,
)
from loadmaster.preflight.serving_model import model_and_config
from loadmaster.preflight.serving_speed import Traffic, usual_request
from loadmaster.preflight.serving_table import print_held, print_servers, print_serving, what_if
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tensor_parallel import block_of, divides

USAGE = "loadmaster plan-serving model=NAME [format=int4] [gpu=l40s] [count=1] [context=8192] [key=value ...] [--json]"
LONGEST = 8192
"""Tokens of a request where nobody says, and the model knows as many."""


@dataclass(frozen=True, config=CLOSED)
class Request:
    """Words of the command."""

    model: str = "???"
    """Hub id, name in conf/model (llama3_1_8b), or a folder with config.json."""
    format: Literal["auto", "bf16", "fp8", "int4"] = "auto"
    """Of the weights; auto: as config.json says that they are stored, else bf16."""
    gpu: str = "auto"
    """Catalogue name; auto lists every machine of the catalogue that fits."""
    count: PositiveInt | Auto = "auto"
    """Cards, joined by tensor parallelism; auto: 1."""
    context: PositiveInt | Auto = "auto"
    """Longest request, prompt and answer, tokens; auto: 8192, or all that the model knows where that is less."""
    cache: Literal["bf16", "fp8"] = "bf16"
    """Of keys and values."""
    utilisation: FractionBelowOne = UTILISATION
    """Share of each card that the server takes."""
    prompt_tokens: PositiveInt | Auto = "auto"
    """Of a usual request; auto: three quarters of context, or what output_tokens leaves of it."""
    output_tokens: PositiveInt | Auto = "auto"
    """Of a usual answer; auto: a quarter of context, or what prompt_tokens leaves of it."""
    best_of_n: PositiveInt = 1
    """Answers to each prompt."""
    prefix_share: FractionBelowOne = 0.0
    """Of a usual prompt, what is the same in all and held once."""
    requests: PositiveFloat = 1
    """Requests of `context` tokens to hold at once."""


def described() -> str:
    """The command's words, each with its default."""
    words = {f"{word.key}={written(word.default)}": word.help for word in fields_of(Request).values()}
    width = max(map(len, words))
    lines = [f"  {word.replace('???', 'NAME'):<{width}}  {said}" for word, said in words.items()]
    return "\n".join([f"usage: {USAGE}", "", *lines, f"  {'--json':<{width}}  the plans as JSON, and nothing else"])


def plan_serving_command(arguments: list[str]) -> int:
    """Print the plan (or JSON with --json); exit code 0, or 3 when it does not fit or not so many requests.

    Raises ConfigError for a wrong word, LoadmasterError for a model that cannot be planned.
    """
    if {"-h", "--help"} & set(arguments):
        print(described())
        return 0
    words = [word for word in arguments if word != "--json"]
    request = parse(words)
    model, config = model_and_config(request.model)
    refuse_other_caches(config, model.name)
    shape = from_config(config, model.name)
    if request.format == "auto":
        request = replace(request, format=stored_format(config))
    request = for_model(request, shape)
    prompt, output = usual_request(request.context, request.prompt_tokens, request.output_tokens)
    traffic = Traffic(prompt, output, samples=request.best_of_n, prefix_share=request.prefix_share)
    options: dict[str, Any] = {"cache": request.cache, "utilisation": request.utilisation}

    def on_card(traffic: Traffic) -> ServingPlan:
        hardware = from_catalog(request.gpu, 1 if request.count == "auto" else request.count)
        context = max(request.context, traffic.prompt_tokens + traffic.output_tokens)  # longer in a what-if alone
        return plan_serving(shape, hardware, request.format, context, traffic=traffic, **options)

    if request.gpu == "auto":
        plans = cheapest_servers(shape, request.format, request.context, request.requests, traffic=traffic, **options)
        plans = [plan for plan in plans if request.count in ("auto", plan.gpus)]
    else:
        plans = [on_card(traffic)]
    plans = [replace(plan, notes=[*_as_stored(config, request.format), *plan.notes]) for plan in plans]
    if "--json" in arguments:
        held = ({"requests": request.requests, "machines": machines_for(plan, request.requests)} for plan in plans)
        print(json.dumps([asdict(plan) | more for plan, more in zip(plans, held, strict=True)], indent=2))
    elif request.gpu != "auto":
        print_serving(plans[0], {name: on_card(other) for name, other in what_if(traffic, shape.max_position).items()})
        if request.requests != Request().requests:
            print_held(plans[0], request.requests)
        elif not plans[0].fits:
            print("gpu=auto lists the machines of the catalogue that hold it", file=sys.stderr)
    elif plans:
        print_serving(plans[0], {})
        print_servers(plans)
    else:
        print(
            f"no machine of the catalogue holds {request.requests:,.10g} requests of {request.context:,} tokens: "
            "try format=int4 or fp8, cache=fp8, or a smaller context", file=sys.stderr,
        )
    return 0 if plans and machines_for(plans[0], request.requests) == 1 else DoesNotFit.exit_code


def stored_format(config: dict[str, Any]) -> Literal["bf16", "fp8", "int4"]:
    """What the weights of a checkpoint are counted in: bf16 too where they are stored in what is not modelled."""
    said = as_object(config.get("quantization_config"))
    groups = map(as_object, as_object(said.get("config_groups")).values())
    stored = [as_object(group.get("weights")) for group in groups]  # as compressed-tensors has it
    kinds = {f"{weights.get('type')}{weights.get('num_bits')}" for weights in stored}
    if said.get("quant_method") == "fp8" or kinds == {"float8"}:
        return "fp8"
    is_older = said.get("quant_method") in ("gptq", "awq") and said.get("bits") == 4
    return "int4" if is_older or kinds == {"int4"} else "bf16"


def _as_stored(config: dict[str, Any], form: str) -> Iterator[str]:
    """A note where bf16 is counted of a checkpoint that has fewer bits."""
    if form == "bf16" and (kind := quantized_by(config)):
        yield f"config.json says that its weights are quantized ({kind}), and bf16 is counted: see format=fp8 or int4"


def parse(words: list[str]) -> Request:
    """Raises ConfigError with every wrong word."""
    known = [field.name for field in fields(Request)]
    values: dict[str, Any] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            close = nearest(key, known)
            hint = f"{close}={text or '...'}" if close else USAGE if equals or word.startswith("-") else f"model={word}"
            problems.append(Problem(key, text or None, "command line", "is not a word of this command", hint))
            continue
        values[key] = text if key in ("model", "gpu") else _value(text)
    if values.get("model") in (None, "", "???"):
        problems.append(Problem("model", None, "command line", "is needed", USAGE))
    if values.get("gpu", "auto") not in ("auto", *catalog.gpus()):
        wrong, known = values.pop("gpu"), ["auto", *catalog.gpus()]
        guess = nearest_card(wrong, known)
        remedy = (f"gpu={guess}; " if guess else "") + f"one of {', '.join(known)}"
        problems.append(Problem("gpu", wrong, "command line", "is not in the catalogue", remedy))
    try:
        request = TypeAdapter(Request).validate_python(values)
    except ValidationError as error:
        wrong = dict.fromkeys(str(entry["loc"][0]) for entry in error.errors())
        raise ConfigError(problems + [_wrong_value(key, values[key]) for key in wrong]) from None
    if problems:
        raise ConfigError(problems)
    return request


def for_model(request: Request, shape: ModelShape) -> Request:
    """The request with what the model decides. Raises ConfigError for one that is longer than its context, and for
    cards that the model cannot be divided over."""
    if request.context == "auto":
        request = replace(request, context=min(LONGEST, shape.max_position or LONGEST))
    if problems := list(_too_long(request, shape.max_position)):
        raise ConfigError(problems)
    block = block_of(shape, request.format)
    able = sorted({m.count for m in rentable() if m.nodes == 1 and divides(shape, m.count, block)})
    undivided = request.count != "auto" and not divides(shape, request.count, block)
    if undivided or (request.gpu == "auto" and request.count not in ("auto", *able)):
        parts = f"{shape.heads} attention heads" + f" and {block} weights to a scale" * (block > 1)
        message = f"a server cannot divide {shape.name}, of {parts}, over so many cards"
        message = message if undivided else "no machine of the catalogue has so many cards"
        remedy = f"count={' or '.join(map(str, able))}"
        raise ConfigError([Problem("count", request.count, "command line", message, remedy)])
    return request


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _wrong_value(key: str, value: Any) -> Problem:
    word = fields_of(Request)[key]
    close = nearest(str(value), choices(word.annotation), cutoff=0.4)
    default = f"{key}={written(word.default)} is the default"
    remedy = f"{key}={close}; {default}" if close and close != word.default else default
    given = "nothing" if value is None else value
    return Problem(key, given, "command line", f"must be {describe(word.annotation)}", remedy)


def _too_long(request: Request, known: int | None) -> Iterator[Problem]:
    """As the job's rule on endpoint.prompt_tokens, output_tokens and max_model_len. known: the model's positions."""
    prompt, output = usual_request(request.context, request.prompt_tokens, request.output_tokens)
    if known and request.context > known:
        message = f"no server takes longer requests than the model knows positions: {known:,} (max_position_embeddings)"
        yield Problem("context", request.context, "command line", message, f"context={known}")
    elif prompt + output > request.context:
        given = ("prompt_tokens", "output_tokens", "context")
        key = next(key for key in given if getattr(request, key) != "auto")
        message = f"a request of {prompt} + {output} tokens is longer than context={request.context}"
        remedy = f"context={prompt + output}"
        if known and prompt + output > known:
            remedy = f"a shorter one: the model knows {known:,} positions (max_position_embeddings)"
        yield Problem(key, getattr(request, key), "command line", message, remedy)
