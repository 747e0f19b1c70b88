"""Write docs/can-i-train-x-on-y.md from the plans themselves; a test holds the page to what is planned now.

python benchmarks/can_i_train.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig, OptimizerConfig
from loadmaster.preflight import Plan, make_plan

PAGE = Path(__file__).parents[1] / "docs" / "can-i-train-x-on-y.md"
LLAMA = "meta-llama/Llama-3.1-"
HEAD = """# Can I train X on Y?

Written by `python benchmarks/can_i_train.py` from the plans themselves. Rows of 2,048 tokens, 64 an optimizer step,
3% of each card left free. Memory of one GPU is exact for weights, gradients and optimizer states and replayed for
activations, loss and what sharding adds (see [preflight](preflight.md)); communicators are modelled. No run on several
GPUs has been measured.

Ask for your own case, on any machine, in about a second:

```
python train.py recipe=full_70b hardware=a100_80gb_x4 stop_after=plan
```

| job | on | answer | why |
|---|---|---|---|
"""
QUESTIONS: list[tuple[str, str, str, str, int, int, dict]] = [
    ("full fine-tune, AdamW, 8B", LLAMA + "8B", "full", "a100_80gb", 1, 1, {"optimizer": "adamw"}),
    (
        "full fine-tune, AdamW, 8B, nothing in host memory",
        LLAMA + "8B",
        "full",
        "a100_80gb",
        1,
        1,
        {"optimizer": "adamw", "offload": "none"},
    ),
    ("full fine-tune, 8-bit states, 8B", LLAMA + "8B", "full", "a100_80gb", 1, 1, {"optimizer": "adamw_8bit"}),
    ("LoRA 8B", LLAMA + "8B", "lora", "a100_80gb", 1, 1, {}),
    ("LoRA 8B", LLAMA + "8B", "lora", "rtx4090", 1, 1, {}),
    ("QLoRA 13B", "meta-llama/Llama-2-13b-hf", "qlora", "a100_80gb", 1, 1, {}),
    ("full fine-tune 70B, in GPU memory", LLAMA + "70B", "full", "a100_80gb", 4, 1, {"offload": "none"}),
    ("full fine-tune 70B", LLAMA + "70B", "full", "a100_80gb", 4, 1, {}),
    (
        "full fine-tune 70B, stepped in the backward pass, 4 rows a step",
        LLAMA + "70B",
        "full",
        "a100_80gb",
        4,
        1,
        {"in_backward": True, "rows": 4},
    ),
    ("full fine-tune 70B", LLAMA + "70B", "full", "h100_80gb", 8, 1, {}),
    ("full fine-tune 70B, AdamW", LLAMA + "70B", "full", "h100_80gb", 8, 2, {"optimizer": "adamw"}),
    ("QLoRA 70B", LLAMA + "70B", "qlora", "a100_80gb", 1, 1, {}),
    ("QLoRA 70B", LLAMA + "70B", "qlora", "rtx4090", 2, 1, {}),
    ("LoRA 405B on a frozen FP8 base", LLAMA + "405B", "lora", "h100_80gb", 8, 1, {"precision": "fp8"}),
    ("LoRA 8B in FP8", LLAMA + "8B", "lora", "a100_80gb", 1, 1, {"precision": "fp8"}),
    ("full fine-tune 405B", LLAMA + "405B", "full", "h100_80gb", 8, 1, {}),
]


def ask(model: str, method: str, gpu: str, count: int, nodes: int, options: dict) -> Plan:
    optimizer = OptimizerConfig(name=options.get("optimizer", "auto"))
    if options.get("in_backward"):
        optimizer = replace(optimizer, in_backward=True, max_grad_norm=0.0)
    batch = BatchConfig(global_size=options.get("rows", 64))
    rest = {key: value for key, value in options.items() if key not in ("optimizer", "in_backward", "rows")}
    return make_plan(
        Job(model=ModelConfig(name=model), method=method, optimizer=optimizer, batch=batch,
            hardware=HardwareConfig(gpu=gpu, count=count, nodes=nodes), **rest)
    )


def answer(plan: Plan) -> tuple[str, str]:
    """(yes or no, why) in a sentence."""
    if plan.fits:
        states = plan.optimizer + (" with fp32 master weights" if plan.master_weights else "")
        states += " in the backward pass" if plan.optimizer_in_backward else ""
        some, layers = plan.checkpointed_layers, plan.model.layers
        of = "" if some is None else f" of {some} of {layers} layers"
        parts = [states, f"activation checkpointing {plan.activation_checkpointing}{of}"]
        parts += [] if plan.sharding == "none" else [plan.sharding]
        parts += [] if plan.offload == "none" else [f"{plan.offload} in host memory ({plan.host_memory_gib:.0f} GiB)"]
        return "yes", f"{plan.memory_gib.total:.1f} of {plan.budget_gib:.1f} GiB; {', '.join(parts)}"
    nearest = plan.reasons[-1] if plan.rejected and plan.rejected[0]["plan"] else plan.reasons[0]
    machines = [a for a in plan.alternatives if a["hardware"] in a["change"]]
    changed = [a for a in plan.alternatives if a not in machines]
    same = [a for a in machines if a["gpu"] == plan.hardware.gpu] or machines
    would = "; or ".join(f"{a['change']} ({a['plan']})" for a in changed[:1] + same[:1])
    return "no", f"{nearest}. What would do: {would}."


def page() -> str:
    lines = [HEAD]
    for job, model, method, gpu, count, nodes, options in QUESTIONS:
        verdict, why = answer(ask(model, method, gpu, count, nodes, options))
        place = f"{count}x {gpu}" if nodes == 1 else f"{nodes} nodes of {count}x {gpu}"
        lines.append(f"| {job} | {place} | **{verdict}** | {why} |\n")
    return "".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
