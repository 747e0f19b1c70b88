"""What quantizing with calibration data takes (export/quantize.py): a layer at a time, row after row of the data.

    every format    the layer, what it makes of a row, and the output of the row before
    gptq            the products of each matrix's inputs in fp32; then those of alike matrices once more, normalised and
                    stacked, with the matrices in fp32
    awq             of every row the inputs of what is scaled, its outputs as they should be and as they become

On a GPU what layers get of other rows is in host memory; a CPU has it beside the whole model. Rows are taken to be as
long as they may be. Held against what llm-compressor allocates (tests/export/test_calibration_memory.py).
"""

from __future__ import annotations

from itertools import groupby

from loadmaster.config.schema import Job
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.memory import Bytes, context_bytes
from loadmaster.preflight.shape import Matrix, ModelShape

CALIBRATED = ("int4", "int4_gptq", "int4_awq", "nvfp4")
"""Formats of export that are quantized with calibration data."""
HESSIANS = ("int4", "int4_gptq")
WIDTH = 2
"""Bytes of a value in bf16."""
SCORE_BYTES = 10
"""Of one score of eager attention, which capped ones are made by: in bf16, in fp32, and its share in fp32."""
UNSCALED_INPUTS = ("gemma3_text",)
"""Families whose attention AWQ does not scale."""


def quantizing(job: Job, shape: ModelShape, hardware: Hardware) -> Bytes:
    """The peak of all formats of the job that calibrate."""
    formats, length = set(job.export.formats), job.sequence_length
    gptq, cpu = bool(formats & set(HESSIANS)), hardware.is_cpu
    row = _passing(shape, length) + _scores(shape, length)
    found = [Bytes(activations=row + WIDTH * length * in_layer(shape))]
    if gptq:
        found += _gptq(shape, length, batched=not cpu)
    if "int4_awq" in formats:
        found += _awq(shape, length, job.export.calibration_rows)
    most = max(found, key=lambda b: b.total)
    if cpu:
        others = job.export.calibration_rows - 1  # their inputs, cosines and sines, token ids, places and mask
        waiting = others * length * (WIDTH * (shape.hidden_size + 2 * shape.widest.head_dim) + 3 * 8)
        weights, context = WIDTH * shape.parameters, context_bytes(hardware)
    else:
        waiting, context = 0, 2 * context_bytes(hardware)
        weights = WIDTH * shape.widest.layer_parameters(second=bool(shape.expert_layers))
    return Bytes(
        weights=weights, activations=most.activations + waiting, quantization=most.quantization, context=context
    )


def _passing(shape: ModelShape, length: int) -> int:
    """A row's input, the sum after attention, that normalised, the output of the row before; cosines and sines."""
    return WIDTH * length * (4 * shape.hidden_size + 2 * shape.widest.head_dim)


def in_layer(shape: ModelShape) -> int:
    """Values of a token at most within a layer: gate, up and product; queries while they are turned; or, for each of a
    token's experts, its input and those, or its output as it is, masked, weighted and sorted."""
    dense = (4 if shape.fused else 3) * shape.intermediate_size if shape.dense_layers else 0
    expert = max(shape.hidden_size + 4 * shape.expert_size, 4 * shape.hidden_size) if shape.expert_layers else 0
    return max(dense, 5 * shape.widest.query_size, shape.experts_per_token * expert)


def _scores(shape: ModelShape, length: int) -> int:
    """Of pairs of a row's tokens: capped scores are there at once, and a window shorter than the row is a mask."""
    if shape.attention_softcap:
        return SCORE_BYTES * shape.heads * length**2
    return 3 * length**2 if any(window and window < length for window in shape.windows) else 0


def _gptq(shape: ModelShape, length: int, batched: bool) -> list[Bytes]:
    """batched: matrices that are alike are quantized together, as on a GPU with room for it."""
    matrices = _linears(shape)
    left = sum(_products(m) for m in matrices)
    row = _passing(shape, length)
    found = [
        Bytes(
            activations=row + WIDTH * length * (m.inputs + m.outputs),
            quantization=left + max(8 * length * m.inputs, 4 * length * m.inputs + _products(m)),
        )
        for m in matrices
    ]
    for _, alike in groupby(sorted(matrices, key=_size), key=_size):
        group = list(alike)
        together, each, weight = (len(group) if batched else 1), _products(group[0]), 4 * group[0].weight
        others = left - together * each
        stacked = (2 * together + 1) * each
        updated = together * (each + 2 * weight) + each
        found.append(Bytes(quantization=others + max(stacked, updated)))
    return found


def _awq(shape: ModelShape, length: int, rows: int) -> list[Bytes]:
    shape = shape.widest
    h, f, q = shape.hidden_size, shape.intermediate_size, shape.query_size
    outputs = q if shape.key_value_size == q and not shape.fused else 0
    inputs = 0 if shape.family in UNSCALED_INPUTS else h
    kept, row = WIDTH * length * rows, _passing(shape, length)
    working = 3 * 4 * max(m.weight for m in _linears(shape))
    scored = 2 * kept * h
    return [
        Bytes(activations=kept * (inputs + outputs + h + f) + row + WIDTH * length * h + (WIDTH + 4) * length * f),
        Bytes(
            activations=kept * (inputs + outputs + h + f) + scored + 5 * WIDTH * length * q + _scores(shape, length),
            quantization=working,
        ),
        Bytes(activations=kept * (h + f) + scored + 3 * WIDTH * length * f, quantization=working),
    ]


def _linears(shape: ModelShape) -> tuple[Matrix, ...]:
    return shape.widest.matrices(second=shape.expert_layers == shape.layers)


def _products(m: Matrix) -> int:
    return 4 * m.inputs**2


def _size(m: Matrix) -> tuple[int, int]:
    return m.inputs, m.outputs
