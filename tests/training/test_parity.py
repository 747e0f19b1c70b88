"""Real processes over gloo train as one process does: same losses, same gradient norms, same weights, same rows."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
TOLERANCE = 1e-5


def case(name: str, method: str, sharding: str, count: int = 1, nodes: int = 1, **others) -> dict:
    return {
        "name": name, "method": method, "sharding": sharding, "count": count, "nodes": nodes, "offload": "none",
        "checkpointing": "none", "optimizer": "adamw", "steps": STEPS, **others,
    }  # fmt: skip


ALONE = [case("full", "full", "none"), case("lora", "lora", "none")]
TWO = [
    case("full-ddp-2", "full", "ddp", 2),
    case("full-fsdp-2", "full", "fsdp", 2),
    case("lora-fsdp-2", "lora", "fsdp", 2),
    case("full-fsdp-2-offload", "full", "fsdp", 2, offload="all"),
    case("full-fsdp-2-compiled", "full", "fsdp", 2, compile=True),
    case("lora-fsdp-2-compiled", "lora", "fsdp", 2, compile=True, checkpointing="selective"),
    case("full-ddp-2-compiled", "full", "ddp", 2, compile=True, checkpointing="full"),
    case("full-fsdp-2-checkpointed", "full", "fsdp", 2, checkpointing="full", offload="optimizer"),
]
FOUR = [
    case("full-hybrid-2x2", "full", "fsdp", 2, 2),
    case("lora-fsdp-4", "lora", "fsdp", 4),
    case("full-fsdp-4", "full", "fsdp", 4),
    case("lora-ddp-4", "lora", "ddp", 4),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(folder: Path, name: str, cases: list[dict], size: int, nodes: int = 1) -> None:
    """Run the cases one after another in one world of `size` processes."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(variable, None)
    port, processes = free_port(), []
    for rank in range(size):
        place = {} if size == 1 else {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % (size // nodes)),
            "LOCAL_WORLD_SIZE": str(size // nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.training.parity", str(path)]
        log = open(folder / f"{name}-{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        processes.append(
            subprocess.Popen(command, env={**environment, **place}, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        )
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    logs = "\n".join((folder / f"{name}-{rank}.log").read_text()[-3000:] for rank in range(size))
    assert codes == [0] * size, logs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


RESUMED = [
    case("full-resumed-alone", "full", "none"),
    case("full-resumed-fsdp-2", "full", "fsdp", 2),
    case("full-resumed-ddp-2", "full", "ddp", 2),
    case("full-resumed-fsdp-8", "full", "fsdp", 8),
]
SAVED_AT = 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> Path:
    """Every case, run once; the folder of each by its name."""
    folder = tmp_path_factory.mktemp("parity")
    for size, nodes, cases in [(1, 1, ALONE), (2, 1, TWO), (4, 2, FOUR[:1]), (4, 1, FOUR[1:])]:
        placed = [{**c, "model": str(model), "out": str(folder / c["name"])} for c in cases]
        spawn(folder, f"world-{size}-{nodes}", placed, size, nodes)
    for size in (1, 2, 8):
        placed = [{**c, "model": str(model), "out": str(folder / c["name"])} for c in RESUMED if c["count"] == size]
        for each in placed:
            resume_from(folder / "full-fsdp-4", Path(each["out"]))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [c["name"] for c in TWO + FOUR])
def test_losses_gradient_norms_weights_and_rows_are_those_of_one_process(runs, name):
    alone, spread = (metrics(runs / n) for n in (name.split("-")[0], name))
    assert len(spread) == STEPS
    for one, many in zip(alone, spread, strict=True):
        assert many["tokens"] == one["tokens"] and many["trained_tokens"] == one["trained_tokens"]
        assert ("eval_loss" in many) == ("eval_loss" in one)
        for key in {"loss", "grad_norm", "eval_loss"} & set(one):
            assert many[key] == pytest.approx(one[key], rel=TOLERANCE), (key, one["step"])
    assert consumed(runs / name) == consumed(runs / name.split("-")[0])
    wanted, got = weights(runs / name.split("-")[0]), weights(runs / name)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [c["name"] for c in RESUMED])
def test_what_four_ranks_saved_one_two_or_eight_go_on_from_and_every_row_is_seen_once(runs, name):
    alone, resumed = metrics(runs / "full"), metrics(runs / name)
    assert [row["step"] for row in resumed] == list(range(1, STEPS + 1))
    for one, many in zip(alone, resumed, strict=True):
        for key in {"loss", "grad_norm", "eval_loss", "tokens"} & set(one):
            assert many[key] == pytest.approx(one[key], rel=TOLERANCE), (key, one["step"])
    together = consumed(runs / "full-fsdp-4")[:SAVED_AT] + consumed(runs / name)
    assert together == consumed(runs / "full") and len(together) == STEPS
    for key, tensor in weights(runs / "full").items():
        torch.testing.assert_close(weights(runs / name)[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)
