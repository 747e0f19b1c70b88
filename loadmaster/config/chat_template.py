"""Whether a text is a chat template, as transformers compiles it, and what it begins a chat with; apart, for who has
none need not import Jinja."""

from __future__ import annotations

import datetime
from typing import Any, ClassVar, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """transformers' own tag, around what the assistant writes."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def broken(template: str) -> str | None:
    """What is wrong with the text, and in which line where Jinja says so; None where nothing is."""
    try:
        Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]).from_string(template)
    except TemplateSyntaxError as error:
        return f"is broken in line {error.lineno}: {error.message}"
    except (SyntaxError, ValueError, RecursionError) as error:  # of the Python that it becomes: a break outside a loop
        return f"is broken: {getattr(error, 'msg', error)}"
    return None


def opening(template: str) -> str | None:
    """What it writes before a chat that has no system message: before the first of the user's turns, and not before the
    next. None where it cannot be rendered. Without the BOS token."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: f"{datetime.date.today():{form}}"}
    turns = [{"role": "assistant" if said == "<2>" else "user", "content": said} for said in ("<1>", "<2>", "<3>")]
    try:
        text = environment.from_string(template).render(
            messages=turns, tools=None, documents=None, add_generation_prompt=False, bos_token="", eos_token=""
        )
    except Exception:  # whatever a template's own code raises, the complaints of a template among it
        return None
    if "<1>" not in text:
        return None
    first, later = text.partition("<1>")[0], text.partition("<2>")[2].partition("<3>")[0]
    return first[: next(end for end in range(len(first) + 1) if later.endswith(first[end:]))]


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
