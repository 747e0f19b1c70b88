"""The schema, read: every field by its dotted key, its type in words, its default and its help text.

Error messages, "did you mean" and docs/configuration.md all come from here, so they cannot disagree.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from loadmaster.config.schema import MOST, Job, Text
from loadmaster.config.synonyms import ALIASES

COUNTED = {"hardware.gpu": "hardware.count", "launch.gpus": "hardware.count"}
"""Where a number was given for a name, it counts what is named."""
NONE_IS = {"data.validation": "holds no rows out", "evaluation.every_steps": "evaluates at the end alone"}
"""Where 0 was given, what null does, which was meant."""
MAKERS = ("", "nvidia", "geforce", "tesla", "quadro")
NEAR_CARD = 0.55
"""How alike the names of two cards have to be: h100_sxm is h100_80gb, v100 is no h200."""


@dataclass(frozen=True)
class Field:
    key: str
    annotation: Any
    default: Any
    section: type

    @property
    def help(self) -> str:
        """The text under the field in its class, "" where there is none."""
        return texts(self.section.__module__).get((self.section.__name__, self.key.rpartition(".")[2]), "")


@cache
def texts(module: str) -> dict[tuple[str, str], str]:
    """What a module's source says under each field, by class and name. It takes long, so only where it is asked for."""
    found = {}
    for section in ast.parse(inspect.getsource(sys.modules[module])).body:
        for field, below in pairwise(section.body if isinstance(section, ast.ClassDef) else []):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
                found[section.name, field.target.id] = " ".join(text.split())
    return found


@cache
def hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


@cache
def fields(root: type = Job) -> dict[str, Field]:
    """Every leaf field of the job by dotted key, in the schema's order; or of another dataclass of the schema."""
    found: dict[str, Field] = {}

    def walk(section: type, prefix: str) -> None:
        for item in dataclasses.fields(section):
            key, annotation = prefix + item.name, hints(section)[item.name]
            default = section.__pydantic_fields__[item.name].default  # type: ignore[attr-defined]
            if dataclasses.is_dataclass(annotation):
                walk(typing.cast(type, annotation), key + ".")
            else:
                found[key] = Field(key, annotation, default, section)

    walk(root, "")
    return found


@cache
def sections() -> dict[str, list[str]]:
    """Fields of each section (`lora` -> [`lora.rank`, ...]); the job's own fields are under the empty name."""
    found: dict[str, list[str]] = {}
    for key in fields():
        found.setdefault(key.rpartition(".")[0], []).append(key)
    return found


def leaves(key: str, value: Any) -> dict[str, Any]:
    """What `key` is set to, by dotted key: `lora={rank: 8}` sets lora.rank, and nothing else of lora."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {name: leaf for part, item in value.items() for name, leaf in leaves(f"{key}.{part}", item).items()}


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, or None when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    word = word.lower()
    if word in by_lower:
        return by_lower[word]
    begun = [  # h100 is h100_80gb and not h200, and a10 no a100
        name for name in by_lower
        if len(word) > 2 and name.startswith(word) and not name[len(word) - 1 : len(word) + 1].isdigit()
    ]
    close = begun or difflib.get_close_matches(word, by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def nearest_card(word: str, cards: Iterable[str]) -> str | None:
    """The GPU's name that was most likely meant: h100_sxm is h100_80gb, the first of the H100s, and not h100_nvl.

    One of another number or letter is another card: a30 is no a40, rtx4080 no rtx4090, and h10 no a10g.
    """
    known, parts = list(cards), [part for part in re.split("[ _-]+", word.lower()) if part not in MAKERS]
    if spelled := nearest("_".join(parts), known, cutoff=0.9):
        return spelled
    if number := re.search(r"\d+", word):
        known = [name for name in known if number[0] in re.findall(r"\d+", name)]
        known = [name for name in known if _is_of_series(_series(word, number[0]), _series(name, number[0]))]
    if alike := [name for name in known if name.split("_")[:1] == parts[:1]]:
        return max(alike, key=lambda name: len({*name.split("_")} & {*parts}))
    return nearest("_".join(parts), known, cutoff=NEAR_CARD)


def known_cards(word: str, cards: Iterable[str], key: str | None = None) -> str:
    """The remedy for a GPU that is none of `cards`: the nearest, as key=NAME where there is a key, and all of them."""
    known = list(cards)
    guess = nearest_card(word, known)
    named = f"{key}={guess}" if key else guess
    return (f"{named}; " if guess else "") + "known are " + ", ".join(known)


OF_APPLES = "is a GPU of Apple's, which is not used: a Mac trains on its processors"
NOT_APPLES = "hardware=cpu (or local, on the Mac), with a model as small as smoke's"


def is_apples(word: str) -> bool:
    """Whether a GPU's name is one of a Mac's: mps, metal, m2, apple_m3_max."""
    return bool(re.fullmatch(r"mps|metal|apple.*|m[1-9](_(pro|max|ultra))?", re.sub("[ -]+", "_", word.lower())))


def _series(name: str, number: str) -> str:
    """The letters right before a card's number: h of h100, none of rtx_6000_ada."""
    found = re.search(rf"([a-z]*){number}(?!\d)", name.lower())
    return found[1] if found else ""


def _is_of_series(word: str, other: str) -> bool:
    """Whether the letters before two numbers may mean one series; more than two are a brand: gtx is rtx misspelt."""
    return not word or not other or len(word) > 2 or word.endswith(other) or other.endswith(word)


def nearest_key(key: str, extra: Iterable[str] = ()) -> str | None:
    """The field or section that a wrong dotted `key` was most likely meant to be.

    Where its section is none, the name says more: `training.max_steps` is max_steps.
    """
    section, _, name = key.rpartition(".")
    everything = [*fields(), *(s for s in sections() if s), *extra]
    same_name = [k for k in everything if k.rpartition(".")[2] == name]
    if section in sections() and (section or not same_name):
        if name.lower() in ALIASES and not any(name in sibling for sibling in sections()[section]):
            return ALIASES[name.lower()]
        siblings = {k.rpartition(".")[2]: k for k in [*sections()[section], *(extra if not section else ())]}
        if match := nearest(name, siblings):
            return siblings[match]
    if section not in sections() and (found := _in_a_section_like(section, name)):
        return found
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if same_name:
        return min(same_name, key=lambda k: k.count("."))
    if not section:
        return nearest(key, everything)
    leaves = {k.rpartition(".")[2]: k for k in reversed(fields())}
    like = nearest(name, leaves, cutoff=0.75)
    if like or section in sections():
        return leaves[like] if like else None
    return nearest(section.rpartition(".")[2], filter(None, sections()), cutoff=0.75)


def _in_a_section_like(section: str, name: str) -> str | None:
    """`optimzer.lr`, `training.lora.rank`: the field, where the section it is in is a real one misspelt."""
    like = nearest(section.rpartition(".")[2], filter(None, sections()), cutoff=0.75)  # trainer is not tracker
    leaves = {k.rpartition(".")[2]: k for k in sections()[like]} if like else {}
    match = nearest(name, leaves)
    return leaves[match] if match else None


def describe(annotation: Any) -> str:
    """A type in words: `an integer above 0, or auto`."""
    return _join([_one(branch) for branch in branches(annotation)])


def branches(annotation: Any) -> list[Any]:
    """The alternatives of a union; the annotation itself when it is none."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [b for arg in typing.get_args(annotation) for b in branches(arg)]
    return [annotation]


def choices(annotation: Any) -> list[str]:
    """Every literal value that a field takes, lists of them included."""
    found: list[str] = []
    for branch in branches(annotation):
        origin, args = typing.get_origin(branch), typing.get_args(branch)
        if origin is Literal:
            found += [str(value) for value in args]
        elif origin is list:
            found += choices(args[0])
    return found


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", or {words[-1]}"


def _one(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _one(str) if args[0] is str else _number(args[0], args[1:])
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list of " + (", ".join(choices(annotation)) if choices(annotation) else f"{_plural(args[0])}")
    if origin is dict:
        return f"a mapping from {_one(args[0]).removeprefix('one of ')}"
    return {str: "text", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}[annotation]


def _plural(annotation: Any) -> str:
    return {str: "texts", Text: "texts", int: "integers", float: "numbers"}.get(annotation, "values")


def is_counted(annotation: Any) -> bool:
    """Whether a number of this type is at most MOST, which goes without saying where it is not exceeded."""
    return any(Le(MOST) in getattr(branch, "__metadata__", ()) for branch in branches(annotation))


def _number(kind: type, constraints: tuple[Any, ...]) -> str:
    if kind is bool:
        return "true or false"
    constraints = tuple(c for c in constraints if c != Le(MOST))
    low = next((c for c in constraints if isinstance(c, Gt | Ge)), None)
    high = next((c for c in constraints if isinstance(c, Lt | Le)), None)
    words = {int: "an integer", float: "a number"}[kind]
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"{words} from {low.ge} to {high.le}"
    limits = []
    if low is not None:
        limits.append(f"above {low.gt}" if isinstance(low, Gt) else f"of at least {low.ge}")
    if high is not None:
        limits.append(f"below {high.lt}" if isinstance(high, Lt) else f"of at most {high.le}")
    return " ".join([words, " and ".join(limits)]).strip()


def written(value: Any) -> str:
    """A value as it stands in YAML and on the command line: true, null, [a,b], {a: b}."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
