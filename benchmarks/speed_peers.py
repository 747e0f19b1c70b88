"""Other trainers' steps, measured in their own environments; started by speed.py, imports nothing of ours.

    python benchmarks/speed_peers.py RUNG.json

RUNG.json: peer (trl, unsloth), model (folder), method, micro_batch_size, sequence_length, steps, warm_up, documents (a
file with token ids and labels of one a line), checkpointing (true, false), liger. Prints "ROW " and a JSON object with
tokens a second (padding left out), trained tokens a second and GiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(path: str) -> None:
    rung = json.loads(Path(path).read_text())
    if rung["peer"] == "unsloth":
        import unsloth  # noqa: F401  (before trl and transformers, which it patches)
    import torch
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of each step; the peak counts from the first timed one."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if len(self.marks) + 1 == rung["warm_up"]:
                    torch.cuda.reset_peak_memory_stats()
            self.marks.append(time.perf_counter())

    clock = Clock()
    model, tokenizer, lora = (unsloth_model if rung["peer"] == "unsloth" else trl_model)(rung, torch)
    trainer = SFTTrainer(
        model=model, args=settings(rung, torch), train_dataset=dataset(rung), processing_class=tokenizer,
        peft_config=lora, callbacks=[clock],
    )
    log = trainer.train()
    timed = clock.marks[rung["warm_up"] - 1 :]
    seconds = (timed[-1] - timed[0]) / (len(timed) - 1)
    tokens, trained = counts(rung)
    print(
        "ROW "
        + json.dumps(
            {
                "tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds,
                "step_s": seconds, "loss": log.training_loss,
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
                "versions": versions(),
            }
        ),
        flush=True,
    )


def trl_model(rung: dict[str, Any], torch: Any) -> tuple[Any, Any, Any]:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantized = rung["method"] == "qlora"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        rung["model"], dtype=torch.bfloat16 if cuda else torch.float32, device_map={"": "cuda:0" if cuda else "cpu"},
        quantization_config=nf4 if quantized else None,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(rung["model"]), None if rung["method"] == "full" else lora


def unsloth_model(rung: dict[str, Any], torch: Any) -> tuple[Any, Any, Any]:
    from unsloth import FastLanguageModel

    full = rung["method"] == "full"
    model, tokenizer = FastLanguageModel.from_pretrained(
        rung["model"], max_seq_length=rung["sequence_length"], load_in_4bit=rung["method"] == "qlora",
        full_finetuning=full, dtype=torch.bfloat16,
    )
    if not full:
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS,
            use_gradient_checkpointing="unsloth" if rung["checkpointing"] else False,
        )
    return model, tokenizer, None


def settings(rung: dict[str, Any], torch: Any) -> Any:
    """The peer's defaults but for what the rung fixes for everybody."""
    from trl import SFTConfig

    own = {} if rung["peer"] == "unsloth" else {"gradient_checkpointing": rung["checkpointing"]}
    if rung.get("liger"):
        own["use_liger_kernel"] = True
    return SFTConfig(
        output_dir=str(Path(rung["documents"]).parent / "peer"), per_device_train_batch_size=rung["micro_batch_size"],
        max_steps=rung["warm_up"] + rung["steps"], max_length=rung["sequence_length"], learning_rate=2e-4,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), logging_steps=1, report_to=[],
        save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, **own,
    )


def documents(rung: dict[str, Any]) -> list[dict[str, Any]]:
    needed = (rung["warm_up"] + rung["steps"]) * rung["micro_batch_size"]
    with open(rung["documents"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return (rows * (needed // len(rows) + 1))[:needed]


def dataset(rung: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(documents(rung))


def counts(rung: dict[str, Any]) -> tuple[float, float]:
    """(tokens, trained tokens) of a step, mean."""
    rows, steps = documents(rung), rung["warm_up"] + rung["steps"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    trained = sum(label != -100 for row in rows for label in row["labels"][1:])
    return tokens / steps, trained / steps


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "transformers", "peft", "trl", "unsloth", "bitsandbytes", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1])
