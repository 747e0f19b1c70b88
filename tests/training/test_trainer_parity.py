"""With the same data order, initial weights and settings, the loss curve is that of transformers' own Trainer.

The Trainer gets each document as a row of its own, padded, under an attention mask; here they are packed. So the
curves agree only if packing, masking, the loss's scale, clipping, optimizer and schedule all agree.
"""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from loadmaster.config.schema import OptimizerConfig
from loadmaster.data import BatchSampler
from loadmaster.models.adapters import make_trainable
from loadmaster.models.load import load_base
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.training.display import Display
from loadmaster.training.loop import train
from loadmaster.training.metrics import read_metrics
from loadmaster.training.rng import seed_everything
from loadmaster.training.stop import StopSignal
from tests.training.test_loop import JOB, PLAN, rows

STEPS = 50
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="constant", warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=0.5)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def documents_of(row) -> list[dict]:
    starts = [i for i, position in enumerate(row.position_ids) if position == 0] + [len(row.input_ids)]
    return [
        {"input_ids": row.input_ids[a:b].tolist(), "labels": row.labels[a:b].tolist()}
        for a, b in itertools.pairwise(starts)
    ]


def gradients_one_by_one(model, rows: list, count: int) -> float:
    """The step's loss, and its gradients in the model, as transformers computes them of each document by itself."""
    total = 0.0
    for document in (each for row in rows for each in documents_of(row)):
        ids, labels = (torch.tensor([document[key]]) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count), use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total


def padded(steps: list[list[dict]]) -> dict:
    """One optimizer step's documents, each a row of its own, padded at the right under a mask."""
    (documents,) = steps
    longest = max(len(d["input_ids"]) for d in documents)
    return {
        name: torch.tensor([value(d) + [fill] * (longest - len(d["input_ids"])) for d in documents])
        for name, value, fill in (
            ("input_ids", lambda d: d["input_ids"], 0),
            ("labels", lambda d: d["labels"], -100),
            ("attention_mask", lambda d: [1] * len(d["input_ids"]), 0),
        )
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_loss_curve_is_the_trainers(tiny, tmp_path, method):
    job = dataclasses.replace(JOB, max_steps=STEPS, optimizer=OPTIMIZER, method=method)
    plan = dataclasses.replace(PLAN, method=method)
    data = rows(60)
    train(
        job,
        plan,
        SimpleNamespace(train=data, validation=None),
        load_tokenizer(tiny),
        tiny,
        tmp_path / "ours",
        "hash",
        lambda model: {"loss": 1.0},
        StopSignal(),
        Display(Console(quiet=True)),
    )
    ours = [row["loss"] for row in read_metrics(tmp_path / "ours" / "metrics.jsonl")]

    seed_everything(job.seed)
    start = make_trainable(load_base(tiny, torch.float32, "cpu"), method, job.lora)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
    if method == "lora":
        model = make_trainable(model, method, job.lora)
    model.load_state_dict(copy.deepcopy(start.state_dict()))
    order = BatchSampler(len(data), job.batch.global_size, job.seed, float("inf"), data.fingerprint)
    batches = [
        [d for i in indices for d in documents_of(data[i])] for indices, _ in zip(order, range(STEPS), strict=False)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=OPTIMIZER.lr,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=batches, data_collator=padded)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert len(ours) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert ours[-1] < ours[0] - 0.2, "the curve has to go somewhere for the comparison to mean anything"
