"""Bytes on disk of a run: the base model, checkpoints, trained weights, and exports with what they are made from."""

from __future__ import annotations

from loadmaster.config.schema import Job
from loadmaster.preflight.calibration import CALIBRATED
from loadmaster.preflight.memory import state_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape

EXPORT_BITS = {
    "bf16": 16.0, "fp8": 8.0, "fp8_block": 8.0, "int4": 4.125, "int4_gptq": 4.125, "int4_awq": 4.125, "nvfp4": 4.5,
}
"""Bits of a quantized weight with its scales: of int4 16 for each 128 weights, of nvfp4 8 for 16. Embeddings and head
stay in bf16."""
GGUF_BITS = {"q8_0": 8.5, "bf16": 16.0, "f16": 16.0}
"""By export.gguf_type; of q8_0 with 16 for each 32 weights. Embeddings and head are as the rest."""


def disk_bytes(job: Job, shape: ModelShape, setup: Setup) -> float:
    """Base model, checkpoints (kept, and the one being written), trained weights, and the exports with scratch."""
    trainable = setup.trainable(shape)
    checkpoints = job.checkpoint.keep_last + job.checkpoint.keep_best + 1
    checkpoint = (setup.width + state_bytes(setup)) * trainable
    base = 2.0 * shape.parameters * (2 if shape.language_model_of else 1)  # its copy in the cache
    return base + checkpoints * checkpoint + setup.width * trainable + export_bytes(job, shape, setup)


def export_bytes(job: Job, shape: ModelShape, setup: Setup) -> float:
    """Every format, and the folders that it is made from: two merges of a QLoRA adapter, a bf16 one to calibrate on."""
    formats = set(job.export.formats)
    sizes = {name: format_bytes(job, shape, setup, name) for name in formats}
    merges = 2 if setup.method == "qlora" else 1 if formats & {*CALIBRATED, "gguf"} else 0
    scratch = max(0, merges - ("bf16" in formats)) * 2.0 * shape.parameters if formats - {"adapter"} else 0.0
    twice = sum(size for name, size in sizes.items() if name in CALIBRATED and name != "nvfp4")  # rounding beside it
    return sum(sizes.values()) + scratch + twice


def format_bytes(job: Job, shape: ModelShape, setup: Setup, name: str) -> float:
    if name == "adapter":
        return float(setup.width * setup.trainable(shape))
    if name == "gguf":
        return shape.parameters * GGUF_BITS[job.export.gguf_type] / 8
    quantized = shape.linear_weights + shape.expert_weights
    return quantized * EXPORT_BITS[name] / 8 + 2 * (shape.parameters - quantized)
