"""Whether a text is a chat template, as transformers compiles it; apart, for who has none need not import Jinja."""

from __future__ import annotations

from typing import Any, ClassVar

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols


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
