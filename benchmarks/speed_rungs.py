"""Our side of speed.py: one rung of the ladder, in a process of its own.

    python benchmarks/speed_rungs.py RUNG.json

The engine's own session, stepped as the loop steps it. The lowest rungs replace what the engine would do: `plain` is
transformers' own forward and loss over padded rows, `packed` the same over packed rows under a mask, `varlen` the
engine's forward with whole logits. Prints "ROW " and a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, LoraConfig, ModelConfig, OptimizerConfig
from loadmaster.data import packed_rows
from loadmaster.errors import LoadmasterError
from loadmaster.models.compiled import CompileCache, graphs_compiled
from loadmaster.models.forward import causal_lm, trained_logits
from loadmaster.preflight import make_plan
from loadmaster.preflight.coefficients import value
from loadmaster.training.batches import trained_tokens
from loadmaster.training.metrics import GIB, peak_memory
from loadmaster.training.session import Session, attention_kernel, make_session
from loadmaster.training.world import World
from loadmaster.world_stages import device_type

CEILING_SIZE = 8192


class PlainLoss(nn.Module):
    """The summed loss as transformers computes it, or over the engine's forward with whole logits."""

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        self.module, self.kind = model, kind
        if kind != "varlen":  # for good: a checkpointed layer runs again in the backward pass
            causal_lm(model).set_attn_implementation("sdpa")

    def forward(self, batch: Any) -> Tensor:
        if self.kind == "varlen":
            logits, targets = trained_logits(self.module, batch)
            return F.cross_entropy(logits, targets, reduction="sum")
        device = causal_lm(self.module).get_input_embeddings().weight.device
        ids, labels, positions = (t.to(device) for t in (batch.input_ids, batch.labels, batch.position_ids))
        how: dict[str, Any] = {"position_ids": positions}
        if self.kind == "plain":  # one document a row: what restarts at 0 after it is padding
            first = (positions == 0).cumsum(dim=1) == 1
            how = {"attention_mask": first.long()}
        logits = self.module(input_ids=ids, use_cache=False, **how).logits.float()
        starts = positions[:, 1:] == 0
        targets = torch.where(starts, -100, labels[:, 1:])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")


def job_of(rung: dict[str, Any]) -> Job:
    chosen = {key: rung[key] for key in ("precision", "activation_checkpointing", "compile") if key in rung}
    rows: Any = rung.get("micro_batch_size", "auto")
    return Job(
        recipe="benchmark",
        model=ModelConfig(name=rung["model"], path=rung["model"]),
        method=rung["method"],
        sequence_length=rung["sequence_length"],
        micro_batch_size=rows,
        batch=BatchConfig(global_size=rung.get("global_size", 1 if rows == "auto" else rows)),
        lora=LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(**rung.get("optimizer", {})),
        hardware=HardwareConfig(count=1),
        offload=rung.get("offload", "none"),
        **chosen,
    )


def rows_of(rung: dict[str, Any], count: int) -> list:
    with open(rung["documents"], encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    made = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in read]
    packing = rung.get("loss") != "plain"
    found = list(packed_rows(made, rung["sequence_length"], packing))
    # Best-fit packing leaves its emptiest rows for the end; a step takes rows of all kinds.
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    return [found[order[i % len(found)]] for i in range(count)]


def run(rung: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if rung.get("memory_gib") and device.type == "cuda":
        tensors = (rung["memory_gib"] - value("context", "cuda_gib")) * GIB  # the context is not the allocator's
        torch.cuda.set_per_process_memory_fraction(tensors / torch.cuda.mem_get_info()[1])
    if rung["kind"] == "ceiling":
        return ceilings(device)
    began = time.perf_counter()
    job = job_of(rung)
    plan = make_plan(job)
    device = torch.device(device_type(plan, job.hardware.gpu))
    if plan.compile:
        CompileCache(Path(rung["documents"]).parent / "compile_cache").open()
    session = make_session(job, plan, World(device=device), 0, Path(rung["model"]))
    if rung.get("loss", "fused") != "fused":
        session.loss = PlainLoss(session.model, rung["loss"])
    packed = rung.get("loss", "fused") in ("fused", "varlen")  # the others' attention is transformers' own
    loaded = time.perf_counter() - began
    with attention_kernel(session, print) if packed else nullcontext("sdpa") as kernel:
        row = measure(session, rung)
    return {
        **row, "attention_kernel": kernel, "load_s": loaded, "planned_tokens_per_second": plan.tokens_per_second,
        "planned_allocated_gib": plan.peak_gib.allocated if plan.peak_gib else None, "plan": chosen(session),
    }


def measure(session: Session, rung: dict[str, Any]) -> dict[str, Any]:
    plan, device = session.plan, session.device
    size, warm_up, steps = plan.micro_batch_size, rung["warm_up"], rung["steps"]
    rows, lr = rows_of(rung, size * (warm_up + steps)), peak_rate(session.job, plan.method)
    seconds, tokens, trained, places, compiled = [], 0, 0, 0, 0
    loss = torch.zeros(())
    for index in range(warm_up + steps):
        picked = rows[index * size : (index + 1) * size]
        if index == warm_up:
            compiled = graphs_compiled()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        batches = session.split(picked)
        loss, _ = session.gradients(batches, max(1, sum(map(trained_tokens, picked))), lr)
        session.optimizer.step(lr)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if index >= warm_up:
            tokens += sum(map(len, picked))
            trained += sum(map(trained_tokens, picked))
            places += sum(batch.input_ids.numel() for batch in batches)
    spent = sum(seconds[warm_up:])
    return {
        "tokens_per_second": tokens / spent, "trained_tokens_per_second": trained / spent, "step_s": spent / steps,
        "padding": 1 - tokens / places, "first_step_s": seconds[0], "loss": loss.item(),
        "recompilations": graphs_compiled() - compiled, **peak_memory(device),
    }


def chosen(session: Session) -> dict[str, Any]:
    names = (
        "method", "precision", "activation_checkpointing", "compile", "optimizer", "micro_batch_size", "sequence_length"
    )
    plan = {name: getattr(session.plan, name) for name in names}
    return {**plan, "flops_per_token": session.plan.model.flops_per_token}


def ceilings(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of one large product, in bf16 and on fp8 units: what a whole step is held against.

    On fp8 units with one scale or one for each row, sums kept in fp32 or not: what models/frozen.py chooses between.
    """
    size = CEILING_SIZE if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    found = {"bf16_tflops": _tflops(lambda: a @ b.t(), size, device)}
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        x, w = (t.to(torch.float8_e4m3fn) for t in (a, b))
        one, rows = torch.ones((), device=device), torch.ones(size, 1, device=device)
        for name, scales, fast in (
            ("fp8_tflops", (one, one), True), ("fp8_full_sums_tflops", (one, one), False),
            ("fp8_by_row_tflops", (rows, rows.t()), True), ("fp8_by_row_full_sums_tflops", (rows, rows.t()), False),
        ):

            def product(scales: Any = scales, fast: bool = fast) -> torch.Tensor:
                return torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

            found[name] = _tflops(product, size, device)
    return found


def _tflops(product: Any, size: int, device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        product()
    synchronize()
    start, times = time.perf_counter(), 20 if device.type == "cuda" else 3
    for _ in range(times):
        product()
    synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start) / 1e12


def make_checkpoint(rung: dict[str, Any]) -> dict[str, Any]:
    """A folder with small random weights of the shape and a tokenizer of bytes, which everybody loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**rung["config"]), dtype=torch.bfloat16)
    model.save_pretrained(rung["model"], max_shard_size="4GB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(rung["model"])
    return {"parameters": sum(p.numel() for p in model.parameters())}


def main(path: str) -> None:
    rung = json.loads(Path(path).read_text())
    try:
        row = make_checkpoint(rung) if rung["kind"] == "checkpoint" else run(rung)
    except torch.OutOfMemoryError as error:
        row = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except LoadmasterError as error:
        row = {"failed": str(error)}
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
