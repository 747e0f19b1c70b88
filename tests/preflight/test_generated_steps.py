"""Whole steps of compiled layers as their generated code allocates them: a plan has no less, and not much more."""

import json
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment

QWEN, LLAMA = "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"
CASES = [  # with how far above the code a count may be: a layer's backward pass is a tenth of three layers' step
    ({"model": QWEN, "method": "lora"}, 0.001),
    ({"model": LLAMA, "method": "full", "precision": "fp8", "checkpointing": "selective"}, 0.06),
    ({"model": LLAMA, "method": "lora", "precision": "fp8", "lora_targets": ["down_proj"]}, 0.001),
    ({"model": QWEN, "method": "lora", "dora": True}, 0.02),
    ({"model": "microsoft/Phi-3-mini-4k-instruct", "method": "full", "precision": "fp8"}, 0.05),
    ({"model": "mistralai/Mixtral-8x7B-v0.1", "method": "lora", "lora_targets": ["q_proj", "v_proj"]}, 0.02),
    ({"model": "google/gemma-3-1b-pt", "method": "full"}, 0.001),  # k and v: one product, one buffer, two results
]


@pytest.mark.slow
def test_a_step_is_counted_with_what_its_generated_code_has_at_once() -> None:
    script = [sys.executable, str(ROOT / "benchmarks/generated_steps.py"), json.dumps([case for case, _ in CASES])]
    env = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([*script, "--json"], env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (case, above), each in zip(CASES, found, strict=True):
        assert 0.9995 <= each["counted"] / each["generated"] <= 1 + above, case
