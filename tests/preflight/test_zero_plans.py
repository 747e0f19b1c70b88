"""Plans with DeepSpeed's ZeRO: taken when asked for, refused where it cannot, counted by the settings it is given."""

from __future__ import annotations

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight import zero_settings
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.hardware import cpu, from_catalog
from loadmaster.preflight.memory import communicator_bytes, memory, phases_in_training, worst_micro_batch, zero_peak
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.zero import zero_bytes
from loadmaster.preflight.zero_settings import PREFETCH_BUCKET, REDUCE_BUCKET, deepspeed_config, max_live, reduce_bucket
from tests.preflight.test_make import LLAMA, plan


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_auto_takes_no_zero_and_what_is_asked_for_is_kept_with_fp32_masters(method: str) -> None:
    assert plan(LLAMA + "8B", method, "h100_80gb", 8).sharding in ("ddp", "fsdp")
    for sharding in ("zero1", "zero2", "zero3"):
        chosen = plan(LLAMA + "8B", method, "h100_80gb", 8, sharding=sharding)
        assert chosen.fits and chosen.sharding == sharding
        assert (chosen.optimizer, chosen.master_weights) == ("adamw", True)


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_whole_weights_cannot_be_offloaded(sharding: str) -> None:
    refused = plan(LLAMA + "8B", "full", "h100_80gb", 8, sharding=sharding, offload="all")
    assert not refused.fits and "use sharding=fsdp or zero3" in refused.rejected[0]["reason"]


def setup(sharding: str, **fields) -> Setup:
    known = {"method": "full", "precision": "bf16", "optimizer": "adamw", "master_weights": True, "world_size": 8}
    return Setup(**{**known, "sharding": sharding, "gpus_per_node": 8, "sequence_length": 2048, **fields})


SHAPE = from_config(
    {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "small",
)


def test_each_stage_cuts_what_it_says() -> None:
    n = SHAPE.parameters
    one, two, three = (zero_bytes(SHAPE, setup(f"zero{stage}")) for stage in (1, 2, 3))
    assert one.weights == two.weights == 2 * n and three.weights == pytest.approx(2 * n / 8, rel=0.01)
    assert one.states == two.states == pytest.approx(12 * n / 8, rel=1e-4)
    assert (one.gradients, two.gradients) == (4 * n, pytest.approx(4 * n / 8, rel=1e-4))
    assert three.kept == 4 * reduce_bucket(n) == 4 * REDUCE_BUCKET
    offloaded = zero_bytes(SHAPE, setup("zero3", offload="all"))
    assert offloaded.weights == pytest.approx(2 * 17 * 1024, rel=0.01), "norms are whole on each GPU"
    assert offloaded.host == pytest.approx((12 + 8 + 2) * n / 8, rel=0.01), "states, gradients twice, weights"


def test_between_steps_and_in_evaluation_is_what_deepspeed_keeps_and_gathers() -> None:
    head, layer, n = SHAPE.embedding_parameters, SHAPE.layer_parameters(False), SHAPE.parameters
    hardware = from_catalog("h100_80gb", 8)
    for offload, gradients in (("none", 4 * n / 8), ("optimizer", 0)):
        given = setup("zero3", offload=offload)
        phases, zero = phases_in_training(SHAPE, hardware, given), zero_bytes(SHAPE, given)
        saved, evaluated, trained = (phases[name] for name in ("save", "evaluate", "train"))
        assert saved.gradients == evaluated.gradients == pytest.approx(gradients, rel=0.01)
        assert saved.communication == communicator_bytes(hardware) + zero.kept
        gathered = evaluated.communication - saved.communication
        assert 2 * (head + 2 * layer) < gathered < 2 * (head + 2 * layer) * 1.3
        assert evaluated.total < trained.total
    assert phases_in_training(SHAPE, hardware, setup("zero1"))["evaluate"].gradients == 0


def test_offload_moves_states_from_the_gpu_to_the_host() -> None:
    hardware = from_catalog("h100_80gb", 8)
    for stage in (1, 2, 3):
        here, there = (memory(SHAPE, hardware, setup(f"zero{stage}", offload=o)) for o in ("none", "optimizer"))
        assert there.train.optimizer == 0 and here.train.optimizer == pytest.approx(12 * SHAPE.parameters / 8, rel=0.01)
        assert there.host_gib - here.host_gib > 12 * SHAPE.parameters / 2**30


def test_deepspeed_takes_the_settings_that_are_counted() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    for sharding, offload in (("zero1", "none"), ("zero2", "optimizer"), ("zero3", "all")):
        config = deepspeed_config(sharding, offload, False, 10**9, max_live(5, 7), 1)
        taken = zero_config(**config["zero_optimization"])
        assert int(taken.stage) == int(sharding[-1]) and taken.reduce_bucket_size == REDUCE_BUCKET
        assert (taken.offload_optimizer is not None) == (offload != "none")
        assert (taken.offload_param is not None) == (offload == "all")
        assert taken.overlap_comm == (sharding == "zero3")
        assert taken.compute_grad_norm == (sharding != "zero1"), "in fp64; our optimizer clips"
        if sharding == "zero3":
            assert (taken.prefetch_bucket_size, taken.max_live_parameters) == (PREFETCH_BUCKET, 19)


def phases(sharding: str, monkeypatch, bucket: int = REDUCE_BUCKET, **fields) -> dict[str, float]:
    monkeypatch.setattr(zero_settings, "REDUCE_BUCKET", bucket)
    return zero_bytes(SHAPE, setup(sharding, **fields)).phases


@pytest.mark.parametrize("bucket", [10**6, 3 * 10**7, 10**9], ids=["small", "like a table", "of all"])
def test_a_bucket_takes_what_it_is_filled_with_and_larger_tensors_what_they_are(bucket, monkeypatch) -> None:
    n, table = SHAPE.parameters, SHAPE.embedding_parameters
    filled = min(bucket, n)
    two, three = (phases(sharding, monkeypatch, bucket) for sharding in ("zero2", "zero3"))
    assert two["loss"] == pytest.approx(-4 * n / 8, rel=1e-4), "the first micro-batch finds no gradients yet"
    alone = (2 + 4 + 2 * (table > n / 8)) * table if table > bucket else 0
    assert two["end"] == 2 * filled + max(6 * filled, alone)
    reduced = max(4 * filled, 6 * table * (table > bucket))
    assert three["end"] == 2 * 2 * table + reduced, "head and embedding are whole"
    ahead = 2 * (PREFETCH_BUCKET + 2 * 1024 * 4096)
    assert three["layers"] - three["loss"] < reduced + ahead + 2 * filled, "a group copied out, a gradient that waits"


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_buckets_are_not_there_while_the_loss_is_most(sharding: str, monkeypatch) -> None:
    monkeypatch.setattr(zero_settings, "REDUCE_BUCKET", 10**6)
    given = setup(sharding, checkpointing="full", gradient_accumulation_steps=2)
    replayed, _ = worst_micro_batch(SHAPE, given)
    at, more = zero_peak(replayed, zero_bytes(SHAPE, given))
    assert at == replayed.phases["loss"] == replayed.at_peak and at["logits"] > at["activations"]
    head, layer = SHAPE.embedding_parameters, SHAPE.layer_parameters(False)
    assert more == (0 if sharding == "zero2" else pytest.approx(2 * (head + 2 * layer + 1024 * 4096), rel=0.01))


def test_gradients_that_zero2_has_not_yet_are_not_taken_off_what_is_sent() -> None:
    """Where the loss is most: of a small model with a large vocabulary."""
    once = setup("zero2", precision="fp32", checkpointing="full", world_size=2, gpus_per_node=2)
    taken = memory(find_shape(ModelConfig(name="google/gemma-3-270m-it")), cpu(2), once).train
    assert (taken.gradients, taken.communication) == (0, 0)


def test_accumulated_micro_batches_of_zero1_find_its_bucket(monkeypatch) -> None:
    once, again = (phases("zero1", monkeypatch, gradient_accumulation_steps=steps) for steps in (1, 2))
    assert (once["loss"], again["loss"]) == (0, 4 * REDUCE_BUCKET)
