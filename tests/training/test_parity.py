"""Real processes over gloo train as one process does: same losses, same gradient norms, same weights, same rows."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.worlds import spawn

STEPS = 6
TOLERANCE = 1e-5


def case(name: str, method: str, sharding: str, count: int = 1, nodes: int = 1, **others) -> dict:
    return {
        "name": name, "method": method, "sharding": sharding, "count": count, "nodes": nodes, "offload": "none",
        "checkpointing": "none", "optimizer": "adamw", "steps": STEPS, "model": "even", **others,
    }


def zeros(count: int, *spreads: str, methods: tuple[str, ...] = ("full", "lora"), model: str = "even") -> list[dict]:
    """Cases of methods under each sharding, or sharding-offload."""
    cases = []
    for method in methods:
        for spread in spreads:
            sharding, _, offload = spread.partition("-")
            tag = [] if model == "even" else [model]
            name = "-".join([method, *tag, sharding, str(count), *filter(None, [offload])])
            cases.append(case(name, method, sharding, count, offload=offload or "none", model=model))
    return cases


ALONE = [
    case("full", "full", "none"),
    case("lora", "lora", "none"),
    case("full-odd", "full", "none", model="odd"),
    case("lora-odd", "lora", "none", model="odd"),
    case("full-experts", "full", "none", model="experts"),
]
TWO = [
    case("full-ddp-2", "full", "ddp", 2),
    case("full-odd-fsdp-2", "full", "fsdp", 2, model="odd"),
    case("full-odd-fsdp-2-whole", "full", "fsdp", 2, model="odd", reshard_after_forward=False),
    case("lora-fsdp-2-whole", "lora", "fsdp", 2, reshard_after_forward=False, checkpointing="full"),
    case("full-odd-fsdp-2-offload", "full", "fsdp", 2, model="odd", offload="all"),
    case("lora-odd-fsdp-2-compiled", "lora", "fsdp", 2, model="odd", compile=True, checkpointing="selective"),
    case("full-fsdp-2-checkpointed", "full", "fsdp", 2, checkpointing="full", offload="optimizer"),
    case("full-fsdp-2-some", "full", "fsdp", 2, checkpointing="full", checkpointed_layers=1, compile=True),
    case("lora-fsdp-2-some", "lora", "fsdp", 2, checkpointing="full", checkpointed_layers=1),
    case("full-fsdp-2-inputs", "full", "fsdp", 2, checkpointing="offload"),
    case("lora-fsdp-2-inputs", "lora", "fsdp", 2, checkpointing="offload", compile=True, reshard_after_forward=False),
    case("full-ddp-2-inputs", "full", "ddp", 2, checkpointing="offload", compile=True),
    case("full-odd-fsdp-2-tried", "full", "fsdp", 2, model="odd", family="not modelled"),
    case("lora-fsdp-2-tried", "lora", "fsdp", 2, family="not modelled", compile=True, reshard_after_forward=False),
    case("full-zero3-2-tried", "full", "zero3", 2, family="not modelled"),
    *zeros(2, "zero3", "zero1-optimizer", "zero2-optimizer", methods=("full",)),
    *zeros(2, "zero2", methods=("lora",)),
    case("full-zero3-2-optimizer", "full", "zero3", 2, checkpointing="full", offload="optimizer"),
    case("full-zero3-2-all", "full", "zero3", 2, checkpointing="offload", offload="all"),
    case("lora-zero3-2-selective", "lora", "zero3", 2, checkpointing="selective"),
]
STEPPED = [
    case(name, "full", "fsdp", 2, max_grad_norm=0.0, micro_batch_size=4, in_backward="in_backward" in name, **others)
    for tag, others in (
        ("", {"model": "odd"}), ("-whole", {"reshard_after_forward": False, "checkpointing": "full"}),
        ("-inputs", {"checkpointing": "offload"}),
    )
    for name in (f"stepped{tag}-after", f"stepped{tag}-in_backward")
]
LIGHT = [
    case(f"{name}-{offload}", "full", "fsdp", 2, optimizer=name, offload=offload)
    for name, offload in (("adamw_bf16", "none"), ("adamw_bf16", "all"), ("adamw_8bit", "all"), ("adafactor", "all"))
] + [
    case(f"{name}-rounded", "full", "fsdp", 2, optimizer=name, precision="bf16", master_weights=False, model="odd")
    for name in ("adamw", "adamw_8bit", "adafactor")
]
HYBRID = [
    case("full-hybrid-2x2", "full", "fsdp", 2, 2),
    case("full-odd-hybrid-2x2-whole", "full", "fsdp", 2, 2, model="odd", reshard_after_forward=False),
]
FOUR = [
    case("lora-fsdp-4", "lora", "fsdp", 4),
    case("full-fsdp-4", "full", "fsdp", 4),
    case("lora-ddp-4", "lora", "ddp", 4),
    *zeros(4, "zero1", "zero2", "zero3", methods=("full",)),
    *zeros(4, "fsdp", "zero2", "zero3", methods=("full",), model="odd"),
    *zeros(4, "fsdp", "zero3", methods=("full",), model="experts"),
]
"""The odd model has a head of its own. Four ranks cut rows of its matrices, so that one row is on two of them; of three
experts one has none."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    folder = tmp_path_factory.mktemp("model")
    even = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2}
    odd = {
        "hidden_size": 63, "intermediate_size": 111, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
    }
    experts = {**even, "num_local_experts": 3, "num_experts_per_tok": 2}
    for name, kind, shape in (
        ("even", LlamaConfig, even), ("odd", LlamaConfig, {**odd, "vocab_size": 513, "tie_word_embeddings": False}),
        ("experts", MixtralConfig, experts),
    ):
        torch.manual_seed(0)
        config = kind(**{
            "num_hidden_layers": 3, "vocab_size": 512, "tie_word_embeddings": True, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, **shape,
        })
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return folder


RESUMED = [
    case(f"full-{source}-then-{sharding}-{count}", "full", sharding, count, source=f"full-{source}-4")
    for source, *then in (
        ("fsdp", ("none", 1), ("fsdp", 8), ("zero1", 2), ("zero2", 2), ("zero3", 2)),
        ("zero1", ("none", 1)),
        ("zero2", ("fsdp", 2)),
        ("zero3", ("none", 1), ("ddp", 2), ("zero3", 8)),
    )
    for sharding, count in then
]
LIGHT_RESUMED = [{**c, "name": f"{c['name']}-then", "source": c["name"]} for c in LIGHT]
SAVED_AT = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> Path:
    """Every case, run once; the folder of each by its name."""
    folder = tmp_path_factory.mktemp("parity")
    for size, nodes, cases in [(1, 1, ALONE), (2, 1, TWO + STEPPED + LIGHT), (4, 2, HYBRID), (4, 1, FOUR)]:
        placed = [{**c, "model": str(model / c["model"]), "out": str(folder / c["name"])} for c in cases]
        spawn(folder, f"world-{size}-{nodes}", placed, size, nodes)
    for size in (1, 2, 8):
        cases = [c for c in RESUMED + LIGHT_RESUMED if c["count"] == size]
        placed = [{**c, "model": str(model / c["model"]), "out": str(folder / c["name"])} for c in cases]
        for each in placed:
            resume_from(folder / each["source"], Path(each["out"]))
        spawn(folder, f"resumed-{size}", placed, size)
    return folder


def resume_from(source: Path, out: Path) -> None:
    """What a run had left that was killed after the checkpoint in the middle."""
    shutil.copytree(source / "checkpoints" / f"step-{SAVED_AT}", out / "checkpoints" / f"step-{SAVED_AT}")
    shutil.copy(source / "metrics.jsonl", out)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted((folder / "saved").glob("*.safetensors")) for k, v in load_file(path).items()}


def consumed(folder: Path) -> list[list[str]]:
    """Rows of every step over all ranks; one that is trained on twice is in it twice."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rows-*.json"))]
    return [sorted(name for rank in step for name in rank) for step in zip(*ranks, strict=True)]


def alone_of(name: str) -> str:
    method, *rest = name.split("-")
    return "-".join([method, *(tag for tag in ("odd", "experts") if tag in rest)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [c["name"] for c in TWO + HYBRID + FOUR])
def test_losses_gradient_norms_weights_and_rows_are_those_of_one_process(runs, name):
    alone, spread = (metrics(runs / n) for n in (alone_of(name), name))
    assert len(spread) == STEPS
    for one, many in zip(alone, spread, strict=True):
        assert many["tokens"] == one["tokens"] and many["trained_tokens"] == one["trained_tokens"]
        assert ("eval_loss" in many) == ("eval_loss" in one)
        for key in {"loss", "grad_norm", "eval_loss"} & set(one):
            assert many[key] == pytest.approx(one[key], rel=TOLERANCE), (key, one["step"])
    assert consumed(runs / name) == consumed(runs / alone_of(name))
    wanted, got = weights(runs / alone_of(name)), weights(runs / name)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [c["name"] for c in STEPPED if c["in_backward"]])
def test_shards_are_stepped_in_the_backward_pass_as_after_it(runs, name):
    """To the last bit but for the norm, which is a sum in another order."""
    after = runs / name.replace("in_backward", "after")
    for one, other in zip(metrics(after), metrics(runs / name), strict=True):
        assert one["loss"] == other["loss"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
    for key, tensor in weights(after).items():
        assert torch.equal(tensor, weights(runs / name)[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [c["name"] for c in LIGHT])
def test_lighter_states_in_shards_are_trained_saved_and_gone_on_with(runs, name):
    """Each rank has states of its own rows; what a checkpoint gives back is what each had."""
    whole, resumed = metrics(runs / name), metrics(runs / f"{name}-then")
    assert len(whole) == STEPS and whole[-1]["loss"] < whole[0]["loss"]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    for key, tensor in weights(runs / name).items():
        assert torch.equal(tensor, weights(runs / f"{name}-then")[key]), key


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_shard_leaves_the_layer_out_on_all(tmp_path, model):
    spoiled = {**STEPPED[1], "model": str(model / "odd"), "out": str(tmp_path / "out")}
    spawn(tmp_path, "spoiled", [spoiled], 2, module="tests.training.stepped_rank")
    ranks = [json.loads((tmp_path / "out" / f"{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        layers = {int(name.split("layers.")[1].split(".")[0]) for name in found["moved"] if "layers." in name}
        assert layers == {0, 2} and not math.isfinite(found["norm"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), [(c["name"], c["source"]) for c in RESUMED])
def test_what_four_ranks_saved_others_go_on_from_under_any_engine_and_every_row_is_seen_once(runs, name, source):
    alone, resumed = metrics(runs / "full"), metrics(runs / name)
    assert [row["step"] for row in resumed] == list(range(1, STEPS + 1))
    for one, many in zip(alone, resumed, strict=True):
        for key in {"loss", "grad_norm", "eval_loss", "tokens"} & set(one):
            assert many[key] == pytest.approx(one[key], rel=TOLERANCE), (key, one["step"])
    together = consumed(runs / source)[:SAVED_AT] + consumed(runs / name)
    assert together == consumed(runs / "full") and len(together) == STEPS
    for key, tensor in weights(runs / "full").items():
        torch.testing.assert_close(weights(runs / name)[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)
