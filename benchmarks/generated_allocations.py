"""Compiled layers for allocations.py: their graphs run on the meta device, unseen, and what inductor's code for an H100
allocates in their place, line by line, is what is recorded.

What a call returns lives as long as the tensor does that it gives; what the code lets go of its arguments, which are
nobody else's by then, goes there.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from allocations import Recorder, flash_scratch
from torch.utils._python_dispatch import _disable_current_modes

sys.path.insert(0, str(Path(__file__).parents[1]))
gpu_code = importlib.import_module("tests.gpu_code")

NEW = re.compile(r"(\w+) = empty_strided_cuda\(")
RENAMED = re.compile(r"(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*; del \2\b")
ALIAS = re.compile(r"(\w+) = (\w+)$")
PART = re.compile(r"(\w+) = (\w+)\[\d+\]")
CALLED = re.compile(r"(\w+) = (?:torch\.ops|extern_kernels)\.")
GONE = re.compile(r"del ([\w, ]+)")
Line = tuple[str, str, str]
"""(what happens, name, other name)."""


class Played(gpu_code.Generated):
    def __init__(self, recorder: Recorder):
        super().__init__("assemble")
        self.recorder = recorder
        self.passed: set[int] = set()
        """Storages that hold what compiled code returned."""
        self.scratch: list[int] = []
        gpu_code.stand_in(90)
        torch._inductor.config.fx_graph_cache = False
        torch._inductor.config.compile_threads = 1
        torch._inductor.config.joint_graph_constant_folding = False

    def _lower(self, module: torch.fx.GraphModule, inputs: list, **options: Any) -> Any:
        with _disable_current_modes():
            run = super()._lower(module, inputs, **options)
        code, sizes = self.latest
        lines, arguments, results = read(code, sizes)
        play = self._play

        def called(given: list) -> Any:
            return play(run, list(given), given, lines, arguments, results, sizes)

        called._boxed_call = True
        return called

    def seen(self, module: torch.fx.GraphModule, graph: Any, code: str, backward: bool) -> None:
        self.latest = code, {name: _bytes(buffer) for name, buffer in graph.name_to_buffer.items()}
        for node in module.graph.nodes:
            if "attn_backward" in str(node.target):
                self.scratch = flash_scratch(node.args[1].meta["val"], node.args[2].meta["val"])

    def _play(self, run, kept, given, lines, arguments, results, sizes) -> Any:
        recorder = self.recorder
        with _disable_current_modes():
            outputs = run(list(kept))
        owned = {}  # buffers that this code has made
        for name, tensor in zip(arguments, kept, strict=False):
            if isinstance(tensor, torch.Tensor):
                owned[name] = tensor.untyped_storage()._cdata
        shared = [*owned.values()]
        recorder.multiplied()  # each graph of a layer has products
        for what, name, other in lines:
            if what == "new":
                owned[name] = ("made", recorder.took(sizes[name]) if sizes.get(name) else None)
            elif what == "renamed":
                if other in owned:
                    owned[name] = owned.pop(other)
            elif what == "attended":
                recorder.passing(*self.scratch)
            elif what == "gone" and name in owned:
                held = owned.pop(name)
                if isinstance(held, tuple):
                    if held[1] is not None:
                        recorder.let_go(held[1])
                elif held in self.passed and shared.count(held) == 1:
                    self._drop(held)
                else:
                    shared.remove(held)
        kept.clear()
        given.clear()
        passed = set()
        for name, tensor in zip(results, outputs, strict=True):
            held = owned.get(name)
            if isinstance(tensor, torch.Tensor) and isinstance(held, tuple) and held[1] is not None:
                storage = tensor.untyped_storage()
                key = storage._cdata
                # Two results may be views of one buffer: products of one input that the compiler made one of.
                if key not in recorder.numbers:
                    recorder.numbers[key] = held[1]
                    self.passed.add(key)
                    weakref.finalize(storage, self._gone, key, held[1])
                passed.add(held[1])
        for held in owned.values():  # what nobody was given
            if isinstance(held, tuple) and held[1] is not None and held[1] not in passed:
                recorder.let_go(held[1])
        return outputs

    def _drop(self, key: int) -> None:
        self.passed.discard(key)
        number = self.recorder.numbers.pop(key)
        if number not in self.recorder.numbers.values():
            self.recorder.let_go(number)

    def _gone(self, key: int, number: int) -> None:
        if self.recorder.numbers.get(key) == number:
            self._drop(key)



def _bytes(buffer: Any) -> int:
    try:
        return math.prod(int(size) for size in buffer.get_size()) * buffer.get_dtype().itemsize
    except Exception:  # several results, or none
        return 0


def read(code: str, sizes: dict[str, int]) -> tuple[list[Line], list[str], list[str]]:
    """(what its call allocates and lets go, names of its arguments, names of its results)."""
    body = code[code.index(" call(") :]
    arguments = re.search(r"\n\s+([\w, ]+?),? = args\n", body)
    names = [name.strip() for name in arguments[1].split(",")] if arguments else []
    lines: list[Line] = []
    results: list[str] = []
    attends = False
    for line in map(str.strip, body.splitlines()):
        if line.startswith("return ("):
            results = [_name(part) for part in _split(line[len("return (") : line.rindex(")")])]
            break
        if made := NEW.match(line):
            lines.append(("new", made[1], ""))
        elif again := RENAMED.match(line):
            lines.append(("renamed", again[1], again[2]))
        elif part := PART.match(line):
            if sizes.get(part[1]):
                lines.append(("new", part[1], ""))
        elif alias := ALIAS.match(line):  # of a call's one result, whose size only this name has
            if sizes.get(alias[1]) and not sizes.get(alias[2]):
                lines.append(("new", alias[1], ""))
        elif call := CALLED.match(line):
            lines += [("new", call[1], "")] if sizes.get(call[1]) else []
            attends = "attn_backward" in line
        elif gone := GONE.match(line.split("#")[0]):
            if attends:  # all its results are there
                lines.append(("attended", "", ""))
                attends = False
            lines += [("gone", name.strip(), "") for name in gone[1].split(",") if name.strip()]
    return lines, names, results


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += letter in "(["
        depth -= letter in ")]"
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _name(part: str) -> str:
    found = re.match(r"reinterpret_tensor\((\w+)", part)
    return found[1] if found else part
