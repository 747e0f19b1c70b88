"""What a step inside the backward pass takes equals a trace of engine and optimizer; so does what Adafactor takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loadmaster.config.schema import BatchConfig, ModelConfig, OptimizerConfig
from loadmaster.data import MicroBatch
from loadmaster.errors import ConfigError
from loadmaster.models.adapters import trainable
from loadmaster.models.forward import token_losses
from loadmaster.models.load import DTYPES
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight import trained
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.memory import STATE_BYTES, resident, step_bytes, worst_micro_batch
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.speed import APART, ROUNDED, optimizer_seconds
from loadmaster.preflight.step import training_step
from loadmaster.preflight.trained import HOST_STEP, PIECE, on_host_bytes
from loadmaster.training import optimizer as optimizers
from loadmaster.training import rounding
from loadmaster.training.in_backward import BackwardOptimizer
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.trace import Case, Live, _meta_model, with_trained_part
from tests.preflight.sharded_trace import sharded_peaks
from tests.preflight.test_make import LLAMA, job, make_plan
from tests.preflight.test_replay import random_config


class Fused(torch.optim.Optimizer):
    """A fused kernel: it takes nothing besides states. PyTorch has none for the meta device."""

    def __init__(self, groups: list) -> None:
        super().__init__(groups, {"lr": 1e-3})

    def step(self) -> None:
        pass


@pytest.fixture
def fused(monkeypatch) -> None:
    real = optimizers._factory
    monkeypatch.setattr(
        optimizers, "_factory", lambda name, *more, **how: Fused if name == "adamw" else real(name, *more, **how)
    )


def traced_peak(step, model, optimizer) -> int:
    """Bytes besides weights and states of the second step."""
    live = Live()
    with live:
        step()
    count_resting(live, model, optimizer)
    before, live.peak = live.live, 0
    with live:
        step()
    return live.peak - before


def count_resting(live, model, optimizer) -> None:
    for tensor in [*model.parameters(), *model.buffers(), *optimizer.state()[0].values()]:
        live.count(tensor)
    for bucket in optimizer.buckets:
        for tensor in bucket.targets:
            live.count(tensor)


def traced_first_peak(step, model, optimizer) -> int:
    """Bytes besides weights and masters of the first step, which makes the other states."""
    live = Live()
    count_resting(live, model, optimizer)
    before, live.peak = live.live, 0
    with live:
        step()
    return live.peak - before


def stepping_in_backward(config: dict, setup: Setup) -> tuple:
    """(a step, its model, its optimizer), which steps inside the backward pass."""
    model = with_trained_part(_meta_model(config, DTYPES[setup.precision]), setup)
    checkpoint_activations(model, setup.checkpointing, setup.kept_layers)
    optimizer = BackwardOptimizer(
        trainable(model), OptimizerConfig(max_grad_norm=0.0), setup.optimizer, setup.master_weights
    )
    ids = torch.zeros(1, setup.sequence_length, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(setup.sequence_length)[None])

    def step() -> None:
        optimizer.begin(1e-3)
        token_losses(model, batch)[0].backward()
        optimizer.clip(0.0)

    return step, model, optimizer


class WithMoments(Fused):
    """Made for all of a bucket before any of it is stepped, as a fused AdamW does."""

    @torch.no_grad()
    def step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p] = self.state[p] or {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}


@pytest.fixture
def with_moments(monkeypatch) -> None:
    real = optimizers._factory
    monkeypatch.setattr(
        optimizers, "_factory", lambda name, *more, **how: WithMoments if name == "adamw" else real(name, *more, **how)
    )


@pytest.mark.parametrize(
    ("family", "name", "precision"),
    [
        ("llama", "adamw", "bf16"), ("llama", "adamw", "fp32"), ("llama", "adamw_8bit", "bf16"),
        *(pytest.param("gemma3_text", name, "bf16", marks=pytest.mark.slow) for name in ("adamw", "adafactor")),
    ],
)
def test_replay_equals_a_trace(fused, family, name, precision) -> None:
    config = {**random_config(family, 1), "num_hidden_layers": 6}
    for checkpointing, kept in (("none", 0), ("full", 0), ("full", 2), ("offload", 0)):
        for tokens in (256, 2000):
            setup = Setup(
                method="full", precision=precision, optimizer=name, master_weights=name == "adamw",
                checkpointing=checkpointing, kept_layers=kept, sequence_length=tokens, in_backward=True,
            )
            truth = traced_peak(*stepping_in_backward(config, setup))
            error = training_step(from_config(config, family), setup, in_place=False).peak / truth - 1
            said = f"{checkpointing} but {kept}, {tokens} tokens"
            assert abs(error) < 0.001, f"{said}: replay is {error:+.3%} from {truth} bytes"


@pytest.mark.parametrize(
    ("family", "name", "masters"),
    [("qwen3_moe", "adamw", True), ("qwen3_moe", "adafactor", False), ("phi3", "adafactor", False),
     ("phi3", "adafactor", True)],
)
def test_experts_and_fused_matrices_are_stepped_with_their_layer(fused, family, name, masters) -> None:
    """Adafactor keeps an update until it has the next square; Phi-3's output matrix comes before its fused one. Where
    there are masters their gradients lie beside that."""
    config = {**random_config(family, 1), "vocab_size": 1000}
    for checkpointing in ("none", "full"):
        setup = Setup(
            method="full", precision="bf16", optimizer=name, master_weights=masters,
            checkpointing=checkpointing, sequence_length=256, in_backward=True,
        )
        truth = traced_peak(*stepping_in_backward(config, setup))
        error = training_step(from_config(config, family), setup, in_place=False).peak / truth - 1
        assert abs(error) < 0.001, f"{checkpointing}: replay is {error:+.3%} from {truth} bytes"


@pytest.mark.parametrize(("family", "tokens"), [("llama", 256), ("llama", 2000), ("qwen3_moe", 256)])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_in_the_first_step_a_layer_gets_its_moments_as_it_is_stepped(with_moments, family, tokens, name) -> None:
    """So where the peak is the loss there are none yet, and where it is the embedding almost all."""
    given = {"num_hidden_layers": 8, "vocab_size": 1000 if family == "qwen3_moe" else 32000}
    config = {**random_config(family, 1), **given}
    shape = from_config(config, family)
    for checkpointing, kept in (("none", 0), ("full", 0), ("full", 2)):
        setup = Setup(
            method="full", precision="bf16", optimizer=name, master_weights=name == "adamw",
            checkpointing=checkpointing, kept_layers=kept, sequence_length=tokens, in_backward=True,
        )
        truth = traced_first_peak(*stepping_in_backward(config, setup))
        error = training_step(shape, setup, in_place=False, made=STATE_BYTES[name]).peak / truth - 1
        assert abs(error) < 0.001, f"{checkpointing} but {kept}: replay is {error:+.3%} from {truth} bytes"


@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_under_fully_shard_it_equals_a_trace_too(fused, reshard) -> None:
    config = {**random_config("llama", 1), "vocab_size": 256, "num_hidden_layers": 6}
    shape = from_config(config, "llama")
    for case in (Case(512), Case(2000, "full"), Case(2000, "full", kept_layers=2), Case(2000, "offload")):
        setup = Setup(
            method="full", precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp", in_backward=True,
            checkpointing=case.checkpointing, kept_layers=case.kept_layers, sequence_length=case.tokens, world_size=8,
            reshard_after_forward=reshard,
        )
        _, peak = sharded_peaks(config, "full", "bf16", case, 8, "all-linear", 1, reshard, in_backward=True)
        replayed = worst_micro_batch(shape, setup, in_place=False)[0].peak
        assert replayed == pytest.approx(peak, rel=0.001), f"{replayed / peak - 1:+.3%}: {case}"


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_under_fully_shard_one_parameter_of_a_unit_is_stepped_at_a_time(fused, family, name) -> None:
    """Embedding and head, whose steps are the peak here; their gradients are in one piece, and go together."""
    config = {**random_config(family, 1), "vocab_size": 32000, "num_hidden_layers": 4, "tie_word_embeddings": False}
    setup = Setup(
        method="full", precision="bf16", optimizer=name, master_weights=name == "adamw", sharding="fsdp",
        in_backward=True, checkpointing="full", sequence_length=256, world_size=2,
    )
    _, peak = sharded_peaks(config, "full", "bf16", Case(256, "full"), 2, in_backward=True, optimizer=name)
    replayed = worst_micro_batch(from_config(config, family), setup, in_place=False)[0].peak
    assert replayed == pytest.approx(peak, rel=0.001), f"{replayed / peak - 1:+.3%}"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("vocabulary", "tied"), [(1000, True), (128256, False)])
def test_what_adafactor_takes_besides_states_equals_a_trace(precision, vocabulary, tied) -> None:
    config = {**random_config("llama", 1), "vocab_size": vocabulary, "tie_word_embeddings": tied}
    setup = Setup(method="full", precision=precision, optimizer="adafactor", master_weights=False)
    model = _meta_model(config, DTYPES[precision])
    # With weight decay the matrices come one after another; without, a norm may lie between two.
    optimizer = TrainingOptimizer(trainable(model), OptimizerConfig(weight_decay=0.1), "adafactor", False)

    def step() -> None:
        for parameter in optimizer.parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step(1e-3)

    shape = from_config(config, "llama")
    gradients = setup.width * shape.parameters
    assert traced_peak(step, model, optimizer) - gradients == pytest.approx(step_bytes(shape, setup), rel=0.001)


STATES = [("adamw", True), ("adamw_8bit", True), ("adamw_8bit", False), ("adafactor", True), ("adafactor", False)]
STEPS = [
    *(("llama", bucket, *states) for states in STATES for bucket in (2**28, 2**21)),
    *(  # either size of a bucket with either family
        pytest.param(family, (2**28, 2**21)[(number + other) % 2], *states, marks=pytest.mark.slow)
        for other, family in enumerate(("qwen3_moe", "gemma3_text")) for number, states in enumerate(STATES)
    ),
]


@pytest.mark.parametrize(("family", "bucket", "name", "masters"), STEPS)
def test_what_a_step_takes_besides_states_equals_a_trace(fused, monkeypatch, family, bucket, name, masters) -> None:
    """Under fp32 masters a gradient is in bf16 and in fp32 at once: of an embedding, 4 bytes an element and not 2."""
    monkeypatch.setattr(rounding, "PIECE", 2**20)
    monkeypatch.setattr(trained, "PIECE", 2**20)
    monkeypatch.setattr(optimizers, "BUCKET_ELEMENTS", bucket)
    monkeypatch.setattr(trained, "BUCKET_ELEMENTS", bucket)
    targets = ("q_proj", "o_proj") if family == "qwen3_moe" else "all-linear"
    for tied in (True, False):
        config = {**random_config(family, 1), "vocab_size": 32000, "tie_word_embeddings": tied}
        shape = from_config(config, family)
        for method, saved in (("full", ()), ("lora", ()), ("lora", ("embed_tokens",)), ("lora", ("lm_head", "norm"))):
            setup = Setup(
                method=method, precision="bf16", optimizer=name, master_weights=masters, modules_to_save=saved,
                lora_targets=targets,
            )
            model = with_trained_part(_meta_model(config), setup)
            named = trainable(model)
            counted = sum(each.elements for each in trained.tensors(shape, setup))
            assert counted == setup.trainable(shape) == sum(p.numel() for _, p in named)
            optimizer = TrainingOptimizer(named, OptimizerConfig(weight_decay=0.1), name, masters)

            def step(optimizer=optimizer) -> None:
                for parameter in optimizer.parameters:
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step(1e-3)

            _, gradients, _ = resident(shape, setup)
            truth = traced_peak(step, model, optimizer)
            # Adafactor's factors of rows and columns are not counted: it shows where matrices are thin.
            apart = 0.01 if (name, masters, method) == ("adafactor", False, "lora") else 0.001
            assert gradients + step_bytes(shape, setup) == pytest.approx(truth, rel=apart), (tied, method, saved)


@pytest.mark.parametrize("bucket", [2**28, 2**21])
@pytest.mark.parametrize(("name", "masters"), [("adamw", True), ("adamw_8bit", True), ("adamw_8bit", False)])
def test_what_the_first_step_takes_equals_a_trace(with_moments, monkeypatch, bucket, name, masters) -> None:
    """As a large embedding's gradient is made fp32, its moments are not there yet."""
    monkeypatch.setattr(rounding, "PIECE", 2**20)
    monkeypatch.setattr(trained, "PIECE", 2**20)
    monkeypatch.setattr(optimizers, "BUCKET_ELEMENTS", bucket)
    monkeypatch.setattr(trained, "BUCKET_ELEMENTS", bucket)
    for tied in (True, False):
        config = {**random_config("llama", 1), "vocab_size": 32000, "tie_word_embeddings": tied}
        shape = from_config(config, "llama")
        setup = Setup(method="full", precision="bf16", optimizer=name, master_weights=masters)
        model = _meta_model(config)
        optimizer = TrainingOptimizer(trainable(model), OptimizerConfig(weight_decay=0.1), name, masters)

        def step(optimizer=optimizer) -> None:
            for parameter in optimizer.parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step(1e-3)

        _, gradients, _ = resident(shape, setup)
        truth = traced_first_peak(step, model, optimizer)
        assert gradients + step_bytes(shape, setup, STATE_BYTES[name]) == pytest.approx(truth, rel=0.001), tied


def stepped(model: str, gpu: str, count: int, rows: int, **settings):
    given = job(LLAMA + model, "full", gpu, count, batch=BatchConfig(rows), offload="none")
    return make_plan(replace(given, optimizer=OptimizerConfig(max_grad_norm=0.0, **settings)), with_alternatives=False)


def test_full_70b_of_eight_rows_a_gpu_fits_four_a100_with_adafactor_in_the_backward_pass_alone() -> None:
    """141 GB of weights on 320 GB; their gradients are as much again, and 8-bit states too. Of four rows both fit."""
    assert not stepped("70B", "a100_80gb", 4, 32, in_backward=False).fits
    found = stepped("70B", "a100_80gb", 4, 32)
    assert found.fits and found.optimizer == "adafactor" and found.optimizer_in_backward
    assert found.micro_batch_size == 8 and found.gradient_accumulation_steps == 1
    assert found.memory_gib.gradients < 8.0  # of embedding and head at the most; all would be 33
    fewer = stepped("70B", "a100_80gb", 4, 4)
    assert fewer.fits and fewer.optimizer == "adafactor" and not fewer.optimizer_in_backward
    assert not stepped("70B", "a100_80gb", 4, 4, name="adamw_8bit").fits
    assert "in the backward pass" in " ".join(c["plan"] for c in found.rejected)


ROWS = 8 * 2**10  # and as many elements as are stepped at once
ON_HOST = [("adamw", True), ("adamw", False), ("adamw_8bit", False), ("adafactor", False)]
"""Over masters four times as many rows: where gradients in fp32 are gone, what rounds a part of it is not seen."""


@pytest.fixture(scope="module")
def taken_on_host() -> dict[tuple[str, bool], float]:
    """Bytes of an element at the step's peak, beside states and gradient, each in a fork that had no other."""
    script = f"""
import os
import bitsandbytes
import torch
from loadmaster.config.schema import OptimizerConfig
from loadmaster.training.optimizer import TrainingOptimizer

torch.set_num_threads(1)

def bytes_of(field):
    return 1024 * int(open("/proc/self/status").read().split(field + ":")[1].split()[0])

def taken(rows, name, masters):
    weight = torch.nn.Parameter(torch.zeros(rows, 2048, dtype=torch.bfloat16))
    optimizer = TrainingOptimizer([("w", weight)], OptimizerConfig(), name, masters, offload=True)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        rest = bytes_of("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        optimizer.step(1e-3)
    return bytes_of("VmHWM") - rest

for name, masters in {ON_HOST!r}:
    if not (child := os.fork()):
        rows = (4 if masters else 1) * {ROWS}
        taken(64, name, masters)  # what a first step loads
        print("taken", taken(rows, name, masters) / (rows * 2048), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("taken ")]
    return dict(zip(ON_HOST, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masters"), ON_HOST)
def test_a_step_on_the_host_takes_what_is_counted(name: str, masters: bool, taken_on_host) -> None:
    """As this process's memory shows it, of a tensor of 17 million."""
    counted = 4 if masters else HOST_STEP[name]
    assert counted - 2.5 < taken_on_host[name, masters] < counted + 1  # the gradient itself may go meanwhile


@pytest.mark.parametrize("masters", [True, False])
def test_adamw_of_fp32_weights_steps_on_the_host_in_no_more_than_their_gradients(masters: bool) -> None:
    """It is torch's fused one, as over masters; of bf16 weights bitsandbytes' has a part at a time."""
    shape = find_shape(ModelConfig(LLAMA + "8B"))
    setup = Setup(method="full", precision="fp32", optimizer="adamw", master_weights=masters, offload="optimizer")
    assert on_host_bytes(shape, setup) == 4 * shape.embedding_parameters  # the largest bucket
    bf16 = replace(setup, precision="bf16", master_weights=False)
    assert on_host_bytes(shape, bf16) == HOST_STEP["adamw"] * PIECE


class Moved(TorchDispatchMode):
    """Bytes that every operation reads and writes, of tensors as large as what is stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        arguments = function._schema.arguments
        written = [arg.alias_info is not None and arg.alias_info.is_write for arg in arguments]
        if not function.is_view and function is not torch.ops.aten.detach.default:
            given = dict(zip((arg.name for arg in arguments), args, strict=False))
            fills = function in (torch.ops.aten.copy_.default,)  # what was there is not read
            for arg, writes in zip(arguments, written, strict=True):
                self._count(given.get(arg.name), 2 if writes and not fills else 1)
            if not any(written):
                self._count(result, 1)
        return result

    def _count(self, value, times: int) -> None:
        if isinstance(value, torch.Tensor) and value.numel() >= 2**20:
            self.total += times * value.numel() * value.element_size()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_what_stepping_and_rounding_move_is_counted_where_nothing_is_compiled(name: str) -> None:
    weight = torch.nn.Parameter(torch.empty(2**10, 2**11, dtype=torch.bfloat16, device="meta"))
    optimizer = TrainingOptimizer([("w", weight)], OptimizerConfig(), name, master_weights=False)
    for _ in range(2):  # the first one makes the states
        weight.grad = torch.empty_like(weight)
        with Moved() as moved:
            optimizer.step(1e-3)
    assert moved.total / weight.numel() == ROUNDED[name] + APART
    assert ROUNDED["paged_adamw_8bit"] == ROUNDED["adamw_8bit"]


@pytest.mark.parametrize(("saved", "rounded"), [((), False), (("embed_tokens",), True)])
def test_what_is_trained_whole_beside_an_adapter_is_rounded_from_its_masters(saved: tuple, rounded: bool) -> None:
    shape, hardware = find_shape(ModelConfig(LLAMA + "8B")), from_catalog("h100_80gb", 1)
    setup = Setup(method="lora", precision="bf16", optimizer="adamw", master_weights=True, modules_to_save=saved)
    plain, compiled = (optimizer_seconds(shape, hardware, replace(setup, compiled=each)) for each in (False, True))
    assert (plain > compiled) == rounded


def test_what_does_not_fit_says_that_it_would_in_the_backward_pass() -> None:
    refused = make_plan(job(LLAMA + "70B", "full", "a100_80gb", 4, offload="none"))
    said = [a for a in refused.alternatives if a["change"].startswith("optimizer.in_backward=true")]
    assert said and said[0]["needs_gib"] < said[0]["budget_gib"]
    assert "global_size" not in said[0]["change"] and "checkpointing offload" in said[0]["plan"]  # all rows at once
    recomputed = make_plan(
        job(LLAMA + "70B", "full", "a100_80gb", 4, activation_checkpointing="full", offload="none")
    )
    assert any("optimizer.in_backward=true" in a["change"] and "batch.global_size=4" in a["change"]
               for a in recomputed.alternatives)


def test_it_is_not_taken_unasked_where_gradients_are_clipped_or_accumulated() -> None:
    clipped = make_plan(job(LLAMA + "8B", "full", "a100_80gb", batch=BatchConfig(1)), with_alternatives=False)
    assert clipped.fits and not clipped.optimizer_in_backward
    refused = stepped("8B", "a100_80gb", 1, 1, in_backward=True, name="adamw")
    assert not refused.fits  # 14 bytes a parameter are too many still
    given = job(LLAMA + "8B", "full", "a100_80gb", batch=BatchConfig(4), micro_batch_size=1)
    optimizer = OptimizerConfig(in_backward=True, max_grad_norm=0.0)
    accumulated = make_plan(replace(given, optimizer=optimizer), with_alternatives=False)
    assert not accumulated.fits and "micro_batch_size=4" in accumulated.reasons[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "optimizer.max_grad_norm=0"),
        (["optimizer.max_grad_norm=0", "sharding=ddp", "hardware.count=2"], "sharding=fsdp"),
        (["optimizer.max_grad_norm=0", "offload=optimizer"], "offload=none"),
    ],
)
def test_what_it_does_not_go_with_is_refused(overrides, says) -> None:
    from loadmaster.config.compose import compose

    with pytest.raises(ConfigError) as error:
        compose(["recipe=full_8b", "hardware=a100_80gb_x1", "optimizer.in_backward=true", *overrides])
    assert says in str(error.value)

