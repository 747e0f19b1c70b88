"""Compiled layers as a GPU would run them, on a machine without one: every kernel is assembled for it, and what the
kernels move, and have at once, is what the preflight counts. Nothing here says how fast they are, or that their numbers
are right; the same graphs' numbers are held on a CPU (tests/training/test_compiled.py)."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight.compiled import in_backward_bytes
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.speed import bytes_moved
from loadmaster.preflight.step import training_step
from tests.gpu_code import LLAMA, TOKENS, generate

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.gpu_code_ready"])
ONE_EACH = ProcessPoolExecutor(1, FORKS, max_tasks_per_child=1)
"""A process for each case, of one that has imported what they need, and generated code once."""
FOUND: dict[tuple[str, ...], dict] = {}
"""What was generated before: several tests ask of the same layers. What is assembled is counted, and what is counted
moves, too, so that tests that ask for more come first."""
LEVELS = ("assemble", "count", "move")
A100, ADA, H100, B200 = 80, 89, 90, 100
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "hidden_activation": "gelu_pytorch_tanh",
}
PHI = {
    "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "vocab_size": 100352,
    "num_attention_heads": 40, "num_key_value_heads": 10, "head_dim": 128, "pad_token_id": 0,
}


GEMMA4 = {  # heads of one size in both kinds of layers, so that each is like the others
    **GEMMA3, "model_type": "gemma4_text", "global_head_dim": 256, "hidden_size_per_layer_input": 0,
    "layer_types": ["full_attention"] * 2,
}
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}
PHI_MINI = {
    **PHI, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
}
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN3 = {"model_type": "qwen3", "intermediate_size": 12288}
QWEN3_SMALL = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
MINISTRAL3 = {"model_type": "ministral3", "vocab_size": 131072}
ARCEE = {
    "model_type": "arcee", "hidden_size": 2560, "intermediate_size": 18432, "num_attention_heads": 20,
    "num_key_value_heads": 4, "hidden_act": "relu2",
}
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4,
}
SMALL = {
    "hidden_size": 2560, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128
}
GRANITE = {
    **SMALL, "model_type": "granite", "num_attention_heads": 32, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "attention_multiplier": 0.0078, "logits_scaling": 8.0,
}
GEMMA = {
    **SMALL, "model_type": "gemma", "hidden_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
}
OLMO2 = {**SMALL, "model_type": "olmo2"}
EXAONE4 = {**SMALL, "model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": 4}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QV = ("q_proj", "v_proj")


def generated(
    method: str, precision: str, capability: int, config: dict | None = None, what: str = "assemble", **fields
) -> dict:
    told = (method, precision, str(capability), json.dumps(config or {}), json.dumps(fields))
    for known in LEVELS[: LEVELS.index(what) + 1]:
        if (*told, known) in FOUND:
            return FOUND[*told, known]
    found = FOUND[*told, what] = ONE_EACH.submit(generate, *told, what).result()
    assert what == "move" or found["cards"] == [capability]
    return found


SHAPE = find_shape(ModelConfig(name="meta-llama/Llama-3.1-8B"))


def counted(setup: Setup, shape: ModelShape = SHAPE) -> float:
    """Bytes of a token of a layer by the preflight, without what attention's own kernel reads and writes."""
    two, twelve = (replace(shape, layers=layers) for layers in (2, 12))
    moved = [bytes_moved(each, training_step(each, setup).work, setup) for each in (two, twelve)]
    times = 3 if setup.checkpointing == "full" else 2
    attention = 2 * times * (2 * shape.query_size + 2 * shape.key_value_size)
    return (moved[1] - moved[0]) / 10 / TOKENS - attention


def later(setup: Setup, shape: ModelShape) -> int:
    """Bytes that torch 2.13 has less at once than is counted: 2.11 makes turned codes of an output's gradient first."""
    return shape.hidden_size * (setup.method == "full" and setup.precision == "fp8")


DEQUANTIZED = 2 * (0.5 + 2) * SHAPE.linear_weights / SHAPE.layers / TOKENS
"""Of nf4 weights, in both passes, by bitsandbytes' own kernels."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "precision", "capability", "beside", "kernels"),
    [("lora", "bf16", A100, 0, 25), ("qlora", "bf16", ADA, DEQUANTIZED, 25), ("lora", "fp8", H100, 0, 25),
     ("full", "bf16", B200, 0, 10), ("full", "fp8", H100, 0, 30)],
)
def test_layers_assemble_for_a_gpu_and_move_what_the_preflight_counts(
    method: str, precision: str, capability: int, beside: float, kernels: int
) -> None:
    found = generated(method, precision, capability)
    assert [kind for kind, _ in found["graphs"]] == ["forward", "backward", "forward"]  # of a layer, and the loss
    assert sum(number for _, number in found["graphs"]) >= kernels
    assert found["mixed"] == 0  # some leave a part of their result unwritten (compiled.py)
    setup = Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True,
        sequence_length=TOKENS,
    )
    assert counted(setup) == pytest.approx(sum(found["bytes"]) + beside, rel=0.02)
    inside, counted_ = found["backward" if setup.adapters else "beyond"], in_backward_bytes(SHAPE, setup)
    assert 0.998 * inside <= counted_ <= 1.002 * inside + later(setup, SHAPE)


@pytest.mark.slow
def test_fused_gate_and_up_have_less_at_once_in_their_backward_pass() -> None:
    shape, setup = from_config({**PHI, "num_hidden_layers": 2}, "phi3"), Setup(
        method="lora", precision="fp8", optimizer="adamw", master_weights=True, compiled=True
    )
    found = generated("lora", "fp8", H100, PHI)
    assert in_backward_bytes(shape, setup) == pytest.approx(found["backward"], rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_layer_without_a_gate_has_less_at_once(method: str, precision: str) -> None:
    shape, setup = from_config({**ARCEE, "vocab_size": 128256, "num_hidden_layers": 2}, "arcee"), Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True
    )
    found = generated(method, precision, H100, ARCEE, "count")
    inside = found["beyond"]
    assert 0.998 * inside <= in_backward_bytes(shape, setup) <= 1.002 * inside + later(setup, shape)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_family_assembles_too(method: str, precision: str) -> None:
    """With norms of q and k, four of a layer, windows, and a GELU, whose gradient is in fp32 for FP8."""
    found = generated(method, precision, H100, GEMMA3)
    assert min(number for _, number in found["graphs"]) >= 1
    shape, setup = from_config({**GEMMA3, "vocab_size": 128256, "num_hidden_layers": 2}, "gemma3_text"), Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True
    )
    assert 0.999 * found["beyond"] <= in_backward_bytes(shape, setup) <= 1.07 * found["beyond"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "config", "fields"),
    [("bf16", None, {"dora": True}), ("bf16", None, {"lora_dropout": 0.1}), ("fp8", PHI, {"lora_dropout": 0.1}),
     ("bf16", QWEN3_SMALL, {"dora": True}), ("fp8", GEMMA3, {"lora_targets": QV}),
     ("fp8", ARCEE, {"lora_targets": QV})],
)
def test_magnitudes_dropout_and_few_targets_have_what_is_counted_at_once_in_their_backward_pass(
    precision: str, config: dict | None, fields: dict
) -> None:
    config = config or LLAMA
    shape = from_config({**LLAMA, **config, "num_hidden_layers": 2}, config["model_type"])
    setup = Setup(
        method="lora", precision=precision, optimizer="adamw", master_weights=True, compiled=True, **fields
    )
    found = generated("lora", precision, H100, config, "count", **fields)
    gone = 2 * shape.hidden_size * setup.dora  # what down's magnitudes scaled, which is not counted
    assert in_backward_bytes(shape, setup) - gone == pytest.approx(found["beyond"], rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "targets", "rank"), [("lora", "all-linear", 512), ("qlora", ("down_proj",), 288)])
def test_beyond_the_highest_rank_that_is_merged_the_gated_products_gradient_has_two_parts(
    method: str, targets: str | tuple[str, ...], rank: int
) -> None:
    shape, setup = from_config({**LLAMA, **QWEN3_SMALL, "num_hidden_layers": 2}, "qwen3"), Setup(
        method=method, precision="bf16", optimizer="adamw", master_weights=True, compiled=True, lora_rank=rank,
        lora_targets=targets,
    )
    found = generated(method, "bf16", H100, QWEN3_SMALL, "count", lora_rank=rank, lora_targets=targets)
    assert in_backward_bytes(shape, setup) == pytest.approx(found["beyond"], rel=0.01)
    assert in_backward_bytes(shape, replace(setup, lora_rank=256)) < 0.85 * found["beyond"]


@pytest.mark.slow
def test_a_backward_pass_with_dropout_moves_what_the_preflight_counts() -> None:
    """Here dropout of the forward pass is a kernel of its own, and on a GPU a part of those around it."""
    setup = Setup(
        method="lora", precision="bf16", optimizer="adamw", master_weights=True, compiled=True, sequence_length=TOKENS,
        lora_dropout=0.1,
    )
    forward = counted(replace(setup, checkpointing="full")) - counted(setup)
    _, backward = generated("lora", "bf16", H100, None, "count", lora_dropout=0.1)["bytes"]
    assert counted(setup) - forward == pytest.approx(backward, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "method", "precision", "fields"),
    [
        *((config, "lora", "bf16", {}) for config in (GEMMA3, PHI, QWEN2, QWEN3, OLMO2, ARCEE)),
        *((config, "full", "bf16", {}) for config in
          (GEMMA2, GEMMA3, GEMMA4, PHI_MINI, QWEN2, QWEN3, MINISTRAL3, GRANITE, GEMMA, EXAONE4, ARCEE)),
        *((config, "lora", "fp8", {}) for config in (GEMMA3, PHI, QWEN3, ARCEE)),
        *((config, "full", "fp8", {}) for config in (GEMMA3, PHI, OLMO2, ARCEE)),
        *((config, "lora", "bf16", {"lora_targets": ATTENTION}) for config in (MIXTRAL, QWEN3_MOE)),
        (MIXTRAL, "full", "bf16", {}),
        *((None, method, "bf16", {"checkpointing": "selective"}) for method in ("lora", "full")),
        (None, "lora", "bf16", {"dora": True}),
        (None, "lora", "bf16", {"lora_targets": QV}),
    ],
    ids=lambda value: value.get("model_type", "-".join(value) or "all") if isinstance(value, dict) else value,
)
def test_layers_of_each_family_move_what_the_preflight_counts(
    config: dict | None, method: str, precision: str, fields: dict
) -> None:
    """Each term of traffic.py with each method and precision that it asks for. What asks for neither is in one case:
    of a model trained whole, which moves less besides, so that a term is more of it."""
    shape = from_config({**LLAMA, **(config or {}), "num_hidden_layers": 2}, (config or LLAMA)["model_type"])
    forward, backward = generated(method, precision, H100, config, "move", **fields)["bytes"]
    setup = Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True,
        sequence_length=TOKENS, **fields,
    )
    assert counted(setup, shape) == pytest.approx(forward + backward, rel=0.03)
    if setup.checkpointing == "none":
        again = replace(setup, checkpointing="full")
        assert counted(again, shape) == pytest.approx(2 * forward + backward, rel=0.03)
