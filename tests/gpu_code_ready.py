"""Imported by the process that those of tests/models/test_gpu_code.py are forks of: what each would import, and make at
its first graph, is there."""

from __future__ import annotations

import gc
from contextlib import suppress

from tests.gpu_code import generate

with suppress(Exception):  # each of them says what is wrong
    generate("lora", "fp8", "90", what="count")
gc.collect()
gc.freeze()  # a fork's collections would walk over it all, and copy it
