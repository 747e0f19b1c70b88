"""Every mistake becomes one Problem with its key, value, origin and remedy; all of them at once."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError, Problem

FORMATS = "adapter, bf16, fp8, fp8_block, int4, int4_gptq, int4_awq, nvfp4, gguf"
CLI = "command line"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(*arguments: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        compose(list(arguments))
    return caught.value.problems


def recipe(folder: Path, text: str, name: str = "mine") -> None:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "key", "message", "remedy"),
    [
        # unknown keys: the nearest field, group or section
        ("lora.rnk=8", "lora.rnk", "there is no such field", "lora.rank=8"),
        ("modle=llama", "modle", "there is no such field", "model=llama2_13b"),
        ("optimzer.lr=1e-3", "optimzer.lr", "there is no such field", "optimizer.lr=0.001"),
        ("optimzer.rate=1e-3", "optimzer.rate", "there is no such field", "optimizer has name, lr, "),
        # an unknown section: the name in it decides
        ("training.max_steps=5", "training.max_steps", "there is no such field", "max_steps=5"),
        ("trainer.max_steps=3", "trainer.max_steps", "there is no such field", "max_steps=3"),
        ("train.epochs=3", "train.epochs", "there is no such field", "epochs=3"),
        ("training.lr=1e-4", "training.lr", "there is no such field", "optimizer.lr=0.0001"),
        ("training.learning_rate=1e-4", "training.learning_rate", "there is no such field", "optimizer.lr=0.0001"),
        ("training.max_step=5", "training.max_step", "there is no such field", "max_steps=5"),
        ("training.steps=5", "training.steps", "there is no such field", "max_steps=5"),
        ("training.lora.rank=8", "training.lora.rank", "there is no such field", "lora.rank=8"),
        ("trainer.model=llama", "trainer.model", "there is no such field", "model=llama2_13b"),
        ("optimizer.foo.bar=1", "optimizer.foo.bar", "there is no such field", "optimizer has name, lr, "),
        ("training.zzz=1", "training.zzz", "there is no such field", "take it out; --help lists every field"),
        ("learning_rate=1e-4", "learning_rate", "there is no such field", "optimizer.lr=0.0001"),
        ("lr=1e-4", "lr", "there is no such field", "optimizer.lr=0.0001"),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", "there is no such field", "optimizer.lr=0.0001"),
        ("max_seq_length=9", "max_seq_length", "there is no such field", "sequence_length=9"),
        # other tools' words whose values are no values of ours: what the field takes, and never another quantity
        ("warmup_steps=100", "warmup_steps", "there is no such field", "optimizer.warmup_steps=100"),
        ("min_lr=1e-5", "min_lr", "there is no such field", "optimizer.min_lr_ratio=...; Learning rate that"),
        ("gradient_accumulation_steps=4", "gradient_accumulation_steps", "there is no such field",
         "batch.global_size=...; Packed rows in one optimizer step"),
        ("batch_size=2", "batch_size", "there is no such field", "batch.global_size=...; Packed rows in one"),
        ("evals_per_epoch=4", "evals_per_epoch", "there is no such field", "evaluation.every_steps=...; Steps between"),
        ("deepspeed=ds.json", "deepspeed", "there is no such field",
         "sharding=..., one of auto, none, ddp, fsdp, zero1, zero2, zero3; How weights"),
        ("lr_scheduler_type=inverse_sqrt", "lr_scheduler_type", "there is no such field",
         "optimizer.schedule=..., one of cosine, linear, constant, wsd"),
        ("num_decay_steps=20", "num_decay_steps", "there is no such field", "optimizer.decay_ratio=...; wsd: share of"),
        ("load_in_4bit=false", "load_in_4bit", "there is no such field", "method=..., one of auto, lora, qlora, full;"),
        # and where they say which value of ours, that one
        ("gradient_checkpointing=true", "gradient_checkpointing", "there is no such field",
         "activation_checkpointing=full"),
        ("gradient_checkpointing=offload", "gradient_checkpointing", "there is no such field",
         "activation_checkpointing=offload"),
        ("activation_checkpointing=false", "activation_checkpointing", "must be one of auto, none",
         "activation_checkpointing=none"),
        ("load_in_4bit=true", "load_in_4bit", "there is no such field", "method=qlora"),
        ("adapter=qlora", "adapter", "there is no such field", "method=qlora"),
        ("bf16=true", "bf16", "there is no such field", "precision=bf16"),
        ("bf16=auto", "bf16", "there is no such field", "precision=auto"),
        ("fsdp=full_shard", "fsdp", "there is no such field", "sharding=fsdp"),
        ("stage=dpo", "stage", "there is no such field", "objective=dpo"),
        ("lora_target=all", "lora_target", "there is no such field", "lora.targets=all-linear"),
        ("optim=paged_adamw_32bit", "optim", "there is no such field", "optimizer.name=adamw"),
        ("optimizer=adamw_torch_fused", "optimizer", "is a section of several fields", "optimizer.name=adamw"),
        ("optimizer.name=adamw_torch_fused", "optimizer.name", "must be one of auto, adamw", "optimizer.name=adamw"),
        ("val_set_size=0.05", "val_set_size", "there is no such field", "data.validation=0.05"),
        ("val_set_size=0", "val_set_size", "there is no such field", "data.validation=null holds no rows out"),
        ("max_samples=1000", "max_samples", "there is no such field", "data.max_rows=1000"),
        ("model_max_length=4096", "model_max_length", "there is no such field", "sequence_length=4096"),
        ("datasets=[a.jsonl]", "datasets", "there is no such field", "data=file data.path=[a.jsonl]"),
        ("path=my.json", "path", "there is no such field", "data=file data.path=my.json"),
        ("path=./mine", "path", "there is no such field", "model.path=./mine"),
        ("datasets=[{path: a.jsonl, type: alpaca},{path: b/c, type: chat_template}]", "datasets",
         "there is no such field", "data.path=[a.jsonl,b/c]"),
        ("data.path=[{path: a.jsonl, type: alpaca}]", "data.path", "must be text, or a list of texts",
         "data.path=[a.jsonl]"),
        ("cutoff_len=9", "cutoff_len", "there is no such field", "sequence_length=9"),
        ("chat_template=chatml", "chat_template", "there is no such field", "model.chat_template=...; File with a"),
        ("use_tensorboard=true", "use_tensorboard", "there is no such field", "tracker.name=tensorboard"),
        ("ddp_timeout=180000000", "ddp_timeout", "there is no such field", "launch.hang_timeout_s=...; Seconds that"),
        ("truncation_mode=keep_start", "truncation_mode", "there is no such field", "data.on_long_row=cut"),
        ("lr_scheduler_type=cosine_with_restarts", "lr_scheduler_type", "there is no such field",
         "optimizer.schedule=cosine"),
        ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_type", "there is no such field",
         "optimizer.schedule=wsd"),
        ("lr_scheduler.decay_ratio=0.2", "lr_scheduler.decay_ratio", "there is no such field",
         "optimizer.decay_ratio=0.2"),
        # what needs no field here, and why
        ("logging_steps=1", "logging_steps", "there is no such field", "take it out: every step is logged"),
        ("data.template=llama3", "data.template", "there is no such field", "take it out: rows are rendered by"),
        ("resume=true", "resume", "there is no such field", "take it out: the same command goes on from"),
        ("flash_attention=true", "flash_attention", "there is no such field", "take it out: attention is always a"),
        ("preprocessing_num_workers=16", "preprocessing_num_workers", "there is no such field", "take it out: rows"),
        ("rpo_alpha=1.0", "rpo_alpha", "there is no such field", "take it out: dpo has no term of likelihood"),
        ("eval_packing=false", "eval_packing", "there is no such field", "take it out: data.packing says it"),
        ("interleave_probs=[0.7,0.3]", "interleave_probs", "there is no such field", "take it out: a file that stands"),
        ("metric_for_best_model=loss", "metric_for_best_model", "there is no such field", "take it out: the best"),
        ("torch_dtype=bf16", "torch_dtype", "there is no such field", "precision=bf16"),
        ("lora_target_modules=q_proj", "lora_target_modules", "there is no such field", "lora.targets=q_proj"),
        ("hardware.gpus=3", "hardware.gpus", "there is no such field", "hardware.count=3"),
        ("hardware.gpus=l40s", "hardware.gpus", "there is no such field", "hardware.gpu=l40s"),
        ("launch.gpu=[l40s]", "launch.gpu", "there is no such field", "launch.gpus=[l40s]"),
        ("gpus=4", "gpus", "there is no such field", "hardware.count=4"),
        ("nodes=2", "nodes", "there is no such field", "hardware.nodes=2"),
        ("+lroa.rank=9", "lroa.rank", "there is no such field", "lora.rank=9"),
        ("zzz=1", "zzz", "there is no such field", "take it out; --help lists every field"),
        ("export.thresholds.fp8.max_meankl=1", "export.thresholds.fp8.max_meankl", "there is no such field",
         "export.thresholds.fp8.max_mean_kl"),
        ("export.thresholds.fp88.max_mean_kl=1", "export.thresholds.fp88", "there is no such field",
         "export.thresholds.fp8"),
        # wrong types and ranges: one message a field, whatever the union
        ("micro_batch_size=lots", "micro_batch_size", "must be an integer above 0, or auto",
         "micro_batch_size=auto is the default"),
        ("micro_batch_size=0", "micro_batch_size", "must be an integer above 0, or auto",
         "micro_batch_size=auto is the default"),
        ("lora.rank='16'", "lora.rank", "must be an integer above 0", "lora.rank=16 (without the quotes)"),
        ("sequence_length=4k", "sequence_length", "must be an integer from 2",
         "sequence_length=4096, if that is what 4k means"),
        ("max_steps=2k", "max_steps", "must be an integer above 0, or null", "max_steps=2000, if that is what 2k"),
        ("hardware.memory_gib=40", "hardware.memory_gib", "there is no such field", "hardware has gpu, count, nodes"),
        ("optimizer.lr=1m", "optimizer.lr", "must be a number above 0, or auto", "optimizer.lr=auto is the default"),
        ("launch.grace_s=2min", "launch.grace_s", "must be a number", "launch.grace_s=120, if that is what 2min"),
        ("data.max_rows=4h", "data.max_rows", "must be an integer above 0", "data.max_rows=null is the default"),
        ("lora.rank=true", "lora.rank", "must be an integer above 0", "lora.rank=16 is the default"),
        ("max_steps=1e3", "max_steps", "must be an integer above 0, or null", "max_steps=1000"),
        ("lora.rank=1e30", "lora.rank", "must be an integer above 0; at most 1,000,000,000", "lora.rank=16 is the"),
        ("lora.rank='-8'", "lora.rank", "must be an integer above 0", "lora.rank=16 is the default"),
        ("max_steps=99999999999999999999", "max_steps", "must be an integer above 0, or null; at most 1,000,000,000",
         "max_steps=null is the default"),
        ("epochs=1e30", "epochs", "must be a number above 0; at most 1,000,000,000", "epochs=1.0 is the default"),
        ("hardware.count=1000000", "hardware.count", "must be an integer from 1 to 64, or auto", "hardware.count=auto"),
        ("hardware.nodes=2000", "hardware.nodes", "must be an integer from 1 to 1024", "hardware.nodes=1 is the"),
        ("launch.nodes=0", "launch.nodes", "must be an integer from 1 to 1024, or auto", "launch.nodes=auto is"),
        ("seed=1.5", "seed", "must be an integer of at least 0 and below 9223372036854775808",
         "seed=42 is the default"),
        ("seed=9223372036854775808", "seed", "below 9223372036854775808", "seed=42 is the default"),
        ("sequence_length=1", "sequence_length", "must be an integer from 2 to 10000000", "sequence_length=2048"),
        ("sequence_length=99999999", "sequence_length", "must be an integer from 2 to 10000000", "sequence_length="),
        ("optimizer.lr=nan", "optimizer.lr", "must be a number above 0, or auto", "optimizer.lr=auto is the default"),
        ("optimizer.warmup_ratio=3", "optimizer.warmup_ratio", "must be a number from 0 to 1",
         "optimizer.warmup_ratio=0.03 is the default"),
        ("data.validation=1.5", "data.validation", "must be text, a number above 0 and below 1, or null",
         "data.validation=0.05 is the default"),
        ("data.validation=0", "data.validation", "must be text, a number above 0 and below 1, or null",
         "data.validation=null holds no rows out"),
        ("evaluation.every_steps=0", "evaluation.every_steps", "must be an integer above 0",
         "evaluation.every_steps=null evaluates at the end alone"),
        # an empty text: a folder that nobody named
        ("data.path=", "data.path", "is empty, as of a shell variable that is not set", "data.path=...; What to train"),
        ("data.path=[a.jsonl,'']", "data.path", "has an empty entry, as of", "data.path=...; What to train"),
        ("data.validation=", "data.validation", "is empty, as of", "data.validation=0.05 is the default"),
        ("model.path=", "model.path", "is empty, as of", "model.path=null is the default"),
        ("run_dir=", "run_dir", "is empty, as of", "run_dir=auto is the default"),
        ("launch.ssh_config=", "launch.ssh_config", "is empty, as of", "launch.ssh_config=null is the default"),
        ("data.packing=yes", "data.packing", "must be true or false", "data.packing=true"),
        ("model.revision=123", "model.revision", "must be text, or null",
         "quote it, so that it stays text: \"model.revision='123'\""),
        ("launch.sbatch=1", "launch.sbatch", "must be a list of texts", "launch.sbatch=[A,B], or leave it out"),
        ("plan.prices_usd_per_hour=3", "plan.prices_usd_per_hour", "must be a mapping from text, or null",
         "plan.prices_usd_per_hour.NAME=VALUE for each, or leave it out"),
        ("launch.env=A", "launch.env", "must be a mapping from text, or null", "launch.env.NAME=VALUE for each"),
        ("method=Lora", "method", "must be one of auto, lora, qlora, full", "method=lora"),
        ("export.formats=fp8", "export.formats", f"must be a list of {FORMATS}", "export.formats=[fp8]"),
        ("export.formats=[bf16,fp16]", "export.formats", f"must be a list of {FORMATS}; 'fp16' is none",
         "bf16 instead of fp16"),
        ("launch.hosts=user@host:2222", "launch.hosts", "must be a list of texts", "launch.hosts=[user@host:2222]"),
        ("launch.hosts=null", "launch.hosts", "must be a list of texts", "launch.hosts=[A,B], or leave it out"),
        ("launch.gpus=l40s", "launch.gpus", "must be a list of texts, or auto", "launch.gpus=[l40s]"),
        ("launch.gpus=Auto", "launch.gpus", "must be a list of texts, or auto", "launch.gpus=auto"),
        ("hardware.gpu=3", "hardware.gpu", "must be text", "hardware.count=3"),
        ("export.thresholds.fp8.max_mean_kl=-1", "export.thresholds.fp8.max_mean_kl", "must be a number above 0",
         "give a number above 0"),
        # a value where a section is
        ("optimizer=adamw", "optimizer", "is a section of several fields, not a value", "optimizer.name=adamw"),
        ("lora=[8]", "lora", "is a section of several fields, not a list", "set lora.rank, lora.alpha"),
        ("lora=8", "lora", "is a section of several fields, not a value",
         "set lora.rank, lora.alpha, lora.dropout, lora.targets"),
        # groups
        ("launch=k8s", "launch", "there is no launch of this name",
         "the options are local, runpod, slurm, ssh; any other machine that ssh reaches by launch=ssh launch.hosts="),
        ("launch=lambda", "launch", "there is no launch of this name", "starts python train.py itself (docs/multi-gpu"),
        ("hardware=h100", "hardware", "there is no hardware of this name", "hardware=h100_80gb_x1; the options are"),
        ("hardware=h100x8", "hardware", "there is no hardware of this name", "hardware=h100_80gb_x8; the options are"),
        ("hardware=b200_x1", "hardware", "there is no hardware of this name",
         "hardware.gpu=b200 hardware.count=1; the options are"),
        ("hardware=rtx3090", "hardware", "there is no hardware of this name", "hardware.gpu=rtx3090; the options are"),
        ("hardware=h100_80gb_x8_n16", "hardware", "there is no hardware of this name",
         "hardware.gpu=h100_80gb hardware.count=8 hardware.nodes=16; the options are"),
        ("hardware=a100_80gb_X4.yaml", "hardware", "there is no hardware of this name", "hardware=a100_80gb_x4; the"),
        ("hardware=8xh100_80gb", "hardware", "there is no hardware of this name", "hardware=h100_80gb_x8; the options"),
        ("hardware=4xl40s", "hardware", "there is no hardware of this name", "hardware.gpu=l40s hardware.count=4; the"),
        ("hardware=h100_x8n2", "hardware", "there is no hardware of this name", "hardware=h100_80gb_x8_n2; the"),
        ("hardware=cpus", "hardware", "there is no hardware of this name", "hardware=cpu; the options are"),
        ("hardware=gpu", "hardware", "there is no hardware of this name", "the options are"),
        ("recipe=lora8b", "recipe", "there is no recipe of this name", "recipe=lora_8b; the options are"),
        ("model=null", "model", "there is no model of this name", "the options are"),
        ("model=lama", "model", "there is no model of this name", "model=llama2_13b; the options are"),
        ("model=Lama3", "model", "there is no model of this name", "model=llama3_1_8b; the options are"),
        ("model=falcon", "model", "there is no model of this name", "the options are"),
        ("model=llama3", "model", "there is no model of this name", "model=llama3_1_8b; the options are"),
        ("data=my.jsonl", "data", "there is no data of this name", "data=file data.path=my.jsonl; the options are"),
        ("data=mine", "data", "there is no data of this name", "any other data by data=file data.path=FILE"),
        ("model=Qwen/Qwen3-8B", "model", "there is no model of this name", "model.name=Qwen/Qwen3-8B; "),
        ("model=./mine", "model", "there is no model of this name", "model.path=./mine; "),
        ("lora.rank==8", "lora.rank", "stands behind two =", "lora.rank=8"),
        ("recipe=lora_8b,", "recipe", "ends with a comma", "recipe=lora_8b"),
        ("data.path=[a.jsonl,", "data.path", "is cut off by a space in the list", "data.path=[a.jsonl,..., or all"),
        ("seed = 3", "seed = 3", "has a space before the =", "seed=3"),
        ("recipe=recipes/smoke.yaml", "recipe", "there is no recipe of this name", "recipe=smoke; the options are"),
        ("data.path=[a.jsonl,]", "data.path", "Hydra cannot read it", "\"data.path=['a.jsonl']\""),
        ("=3", "=3", "sets nothing: there is no key before the =", "write key=value"),
        ("tracker=[wandb,mlflow]", "tracker", "takes one option", "tracker=mlflow"),
        ("++model=llama3_1_8b", "model", "a group cannot be forced with ++", "model=llama3_1_8b"),
        ("foo@bar=baz", "foo@bar", "there is no group foo", "the groups are data, endpoint"),
        # what Hydra cannot read, or would die of
        ("smoke", "smoke", "is not of the form key=value", "recipe=smoke"),
        ("long" * 99, "long" * 99, "is not of the form key=value", "write key=value"),
        ("my.jsonl", "my.jsonl", "is not of the form key=value", "data=file data.path=my.jsonl"),
        ("a/config.yml", "a/config.yml", "is not of the form key=value",
         "put it into recipes/ here as config.yaml, then recipe=config"),
        ("recipes/smoke.yaml", "recipes/smoke.yaml", "is not of the form key=value", "recipe=smoke"),
        ("--cfg", "--cfg", "there is no such option here", "leave it out"),
        ("--config-dir=a", "--config-dir=a", "there is no such option here", "leave it out"),
        ("--lora-rank=8", "--lora-rank=8", "there is no such option here", "set without dashes: lora.rank=8"),
        ("data.path=[a", "data.path", "Hydra cannot read it", "'data.path=\"[a\"'"),
        ("data.path=a${b", "data.path", "Hydra cannot read it", r"""'data.path="a\${b"'"""),
        ("launch.sbatch=[--partition=gpu]", "launch.sbatch", "Hydra cannot read it",
         "\"launch.sbatch=['--partition=gpu']\""),
        ("launch.sbatch=[--qos=a, '--mem=9G']", "launch.sbatch", "Hydra cannot read it",
         "\"launch.sbatch=['--qos=a','--mem=9G']\""),
        ("seed=1,2", "seed", "several values, but this is a single run", "add --multirun for one run each"),
        ("export.formats=fp8,bf16", "export.formats", "several values", "export.formats=[fp8,bf16] for a list, or"),
        ("+seed=3", "seed", "+ adds what is not there yet", "seed=3"),
        ("~modl", "modl", "there is nothing of this name to take away", "~model"),
        ("~seed=3", "seed", "is 42 and not 3", "~seed"),
        ("run_dir=${nope}", "run_dir", "cannot be resolved: Interpolation key 'nope' not found", r"${, write \${"),
        ("data=file", "data.path", "has no value yet", "data.path=...; What to train on"),
    ],
)
def test_one_mistake_is_one_problem_with_its_remedy(argument: str, key: str, message: str, remedy: str):
    (problem,) = problems(argument)
    assert problem.key == key
    assert message in problem.message
    assert remedy in problem.remedy
    if argument != "data=file":
        assert problem.origin == CLI


@pytest.mark.parametrize("name", ["a b,c.jsonl", "say \"a\" ü.jsonl", "it's.jsonl", 'of "a", \'b\'.jsonl'])
def test_the_words_that_a_file_of_an_unusual_name_is_told_to_be_given_by_name_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("{}\n")
    (problem,) = problems("data=file", f"data.path={name}")
    (word,) = shlex.split(problem.remedy.partition("Hydra: ")[2])
    assert compose(["data=file", word]).job.data.path == name


def test_an_option_and_the_value_behind_it_are_one_problem():
    first, *others = problems("--lora-rank", "8", "--fast", "seed=x", "-n")
    assert (first.key, first.remedy) == ("--lora-rank 8", "fields are set without dashes: lora.rank=8")
    assert [problem.key for problem in others] == ["--fast", "seed", "-n"]
    option, values = problems("--multirun", "seed=1,2")  # of a command that makes no runs
    assert (option.remedy, values.remedy) == ("leave it out", "give one of them here")


def test_a_configuration_of_another_tool_is_answered_line_by_line(here: Path):
    recipe(here, "model_name_or_path: a/b\noptimizer: adamw_torch\nlr_scheduler:\n  num_warmup_steps: 9\n"
                 "dataset:\n  packed: false\nfsdp_config:\n  offload_params: true\nspecial_tokens:\n  pad_token: x\n")
    assert [(problem.origin, problem.remedy.partition(";")[0]) for problem in problems("recipe=mine")] == [
        ("recipes/mine.yaml:1", "model.name: a/b"),
        ("recipes/mine.yaml:2", "optimizer.name: adamw"),
        ("recipes/mine.yaml:4", "optimizer.warmup_steps: 9"),
        ("recipes/mine.yaml:6", "data.packing: false"),
        ("recipes/mine.yaml:8", "offload: all"),
        ("recipes/mine.yaml:10", "take it out: special tokens are the tokenizer's, ends of turns its template's"),
    ]


def test_an_empty_path_of_a_file_is_a_problem_with_its_line_and_an_empty_system_message_is_none(here: Path):
    recipe(here, "data:\n  path: ''\n  system: ''\nlaunch:\n  env: {A: ''}\n")
    (problem,) = problems("recipe=mine")
    assert (problem.key, problem.value, problem.origin) == ("data.path", "", "recipes/mine.yaml:2")
    assert problem.message == "is empty"


def test_a_path_from_the_home_folder_is_read_without_quotes_and_said_in_full(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home/my model").mkdir(parents=True)
    (here / "home/my model/config.json").write_text("{}")
    for name in ("a.jsonl", "b.jsonl"):
        (here / "home" / name).write_text("{}\n")
    own = ["data=file", "data.path=[~/a.jsonl, ~/b.jsonl]", "data.validation=~/b.jsonl"]
    job = compose(["model.path=~/my model", "run_dir=~/run", *own[:2]]).job
    assert (job.model.path, job.run_dir, job.data.path) == ("~/my model", "~/run", ["~/a.jsonl", "~/b.jsonl"])
    assert [(p.key, p.value) for p in problems(*own)] == [("data.validation", "~/b.jsonl")]  # which is trained on
    (problem,) = problems("model.path=~/other")
    assert problem.message == f"is not a folder here ({here / 'home/other'})"
    (problem,) = problems("data=file", "data.path=~/c.jsonl")
    assert problem.message == "there is no such file" and problem.remedy[:-7] == "data.path=~/"
    (problem,) = problems("data=file", "data.path=https://example.org/c.jsonl")
    assert problem.remedy == "download it and give the file, or a Hub dataset as data.path=OWNER/NAME"
    assert [p.message for p in problems("model.path=~nobody-of-this-name/other")] == ["is not a folder here"]
    assert not taken("model.path=~/my model") and problems("model.path=~/a,~/b")[0].message.startswith("several values")
    assert [(p.value, p.message) for p in problems("model.path=a~b")] == [("a~b", "is not a folder here")]


def test_a_folder_given_as_the_groups_option_is_the_models_path(here: Path):
    (here / "mine").mkdir()
    (here / "mine/config.json").write_text("{}")
    assert [p.remedy.partition(";")[0] for p in problems("model=mine")] == ["model.path=mine"]


def test_each_key_of_an_unknown_section_is_a_problem_where_it_was_set(here: Path):
    recipe(here, "training:\n  max_steps: 5\n  lr: 0.1\n")
    assert [(p.key, p.value, p.origin, p.remedy) for p in problems("recipe=mine", "trainer.epochs=2")] == [
        ("trainer.epochs", 2, CLI, "epochs=2"),
        ("training.max_steps", 5, "recipes/mine.yaml:2", "max_steps: 5"),
        ("training.lr", 0.1, "recipes/mine.yaml:3", "optimizer.lr: 0.1"),
    ]


@pytest.mark.parametrize(
    "argument",
    ["launch.hosts=user@host:2222", "launch.sbatch=[--partition=gpu,--qos=x]", "launch.sbatch=--partition", "nodes=2"],
)
def test_what_is_proposed_is_taken(argument: str):
    """As a shell would hand it over: without its double quotes."""
    proposed = problems(argument)[0].remedy.rpartition(": ")[2].strip('"')
    assert not any("must be" in p.message or "Hydra" in p.message for p in taken(proposed))


def taken(argument: str) -> list[Problem]:
    try:
        compose([argument])
    except ConfigError as error:
        return error.problems
    return []


def test_every_mistake_of_the_command_line_and_of_the_files_is_reported_in_reading_order(here: Path):
    (here / "conf/model").mkdir(parents=True)
    (here / "conf/model/tiny.yaml").write_text("nam: my/tiny\n")
    recipe(here, "defaults:\n  - override /model: tiny\nmethod: lorra\nlora:\n  rank: '8'\n  alfa: 3\nsedd: 4\n")
    found = problems(
        "recipe=mine", "hardware=a100", "optimizer.lr=fast", "smoke", "~nothing", "epochs=0", "export.formats=[int8]",
        "endpoint.serve_as=fp9",
    )
    assert [(p.key, p.value, p.origin) for p in found] == [
        ("hardware", "a100", CLI),
        ("optimizer.lr", "fast", CLI),
        ("smoke", None, CLI),
        ("nothing", None, CLI),
        ("epochs", 0, CLI),
        ("export.formats", ["int8"], CLI),
        ("endpoint.serve_as", "fp9", CLI),
        ("model.nam", "my/tiny", "conf/model/tiny.yaml:1"),
        ("method", "lorra", "recipes/mine.yaml:3"),
        ("lora.rank", "8", "recipes/mine.yaml:5"),
        ("lora.alfa", 3, "recipes/mine.yaml:6"),
        ("sedd", 4, "recipes/mine.yaml:7"),
    ]
    assert [p.remedy for p in found[-5:]] == [
        "model.name: my/tiny", "method: lora", "lora.rank: 8 (without the quotes)", "lora.alpha: 3", "seed: 4",
    ]


def test_rules_are_reported_beside_wrong_values_but_not_about_them():
    found = problems("seed=x", "method=full", "lora.dropout=0.1", "sharding=sharded", "hardware=h100_80gb_x8")
    assert [p.key for p in found] == ["seed", "lora.dropout", "sharding"]
    assert "has no effect" in found[1].message


@pytest.mark.parametrize(
    ("text", "key", "origin", "message", "remedy"),
    [
        ("lora:\n  rank: 3\n  rank: 4\n", "recipes/mine.yaml", "recipes/mine.yaml:3", "duplicate key rank", "keep one"),
        ("lora:\n  rank: 3\n alpha: 4\n", "recipes/mine.yaml", "recipes/mine.yaml:3", "not valid YAML", "indentation"),
        ("- lora\n", "recipes/mine.yaml", "recipes/mine.yaml", "it holds no fields", "a line key: value"),
        ("3\n", "recipes/mine.yaml", "recipes/mine.yaml", "it holds no fields", "a line key: value"),
        ("seed: \0", "recipes/mine.yaml", "recipes/mine.yaml", "unacceptable character", "a line key: value"),
        ("defaults:\n  - override /model: tinny\n", "model", "recipes/mine.yaml:2", "there is no model of this name",
         "the options are llama2_13b, llama3_1_405b, llama3_1_70b, llama3_1_8b, smollm2_135m"),
        ("defaults:\n  - /tracker: [mlflow]\n  - override /model: tinny\n", "model", "recipes/mine.yaml:3",
         "there is no model of this name", "the options are"),
        ("seed: 3\ndefaults:\n  - /recipe: smoke\n", "defaults", "recipes/mine.yaml:3",
         "leads back to this recipe", "- /recipe/NAME takes in another recipe"),
        ("defaults:\n  - mine\n", "defaults", "recipes/mine.yaml", "leads back to this recipe", ""),
        ("defaults:\n  - /recipe/mine\n", "defaults", "recipes/mine.yaml:2", "leads back to this recipe", ""),
        ("defaults:\n  - /recipes/smoke\n", "recipes/smoke", "recipes/mine.yaml:2", "there is no group recipes",
         "recipe/smoke; the groups are data, endpoint"),
        ("defaults:\n  - override /modl: x\n", "modl", "recipes/mine.yaml:2", "no such group", "override /model: ..."),
    ],
)
def test_a_file_that_does_not_compose_is_named_with_its_line_beside_the_command_lines_mistakes(
    here: Path, text: str, key: str, origin: str, message: str, remedy: str
):
    recipe(here, text)
    found = problems("recipe=mine", "lora.rnk=3")
    assert [p.key for p in found] == ["lora.rnk", key]
    assert found[1].origin == origin
    assert message in found[1].message
    assert remedy in found[1].remedy


def test_a_recipe_that_is_no_utf_8_is_named_and_not_a_shipped_file(here: Path):
    recipe(here, "seed: 1\n")
    (here / "recipes/mine.yaml").write_bytes("# Müller's\nseed: 1\n".encode("latin-1"))
    (found,) = problems("recipe=mine")
    assert (found.key, found.origin) == ("recipes/mine.yaml", "recipes/mine.yaml")
    assert "can't decode byte 0xfc" in found.message


@pytest.mark.parametrize("word", ["defalts", "default", "Defaults"])
def test_a_misspelt_list_of_defaults_is_not_to_be_taken_out(here: Path, word: str):
    recipe(here, f"{word}:\n  - override /model: llama3_1_8b\n")
    (problem,) = problems("recipe=mine")
    assert (problem.key, problem.origin) == (word, "recipes/mine.yaml:1")
    assert problem.remedy == "defaults, if it is the list of what the file builds on"


def test_a_config_name_or_config_dir_that_is_not_there_is_a_problem():
    with pytest.raises(ConfigError) as caught:
        compose([], config_name="trian")
    assert [(p.key, p.value, p.remedy) for p in caught.value.problems] == [("--config-name", "trian", "one of train")]
    with pytest.raises(ConfigError) as caught:
        compose([], config_dir="nowhere")
    assert [(p.key, p.value) for p in caught.value.problems] == [("--config-dir", "nowhere")]


@pytest.mark.parametrize("name", ["Übung (1).jsonl", "my file.jsonl", "a=b.jsonl", "お客様&#.jsonl", "it(.jsonl"])
def test_a_file_of_any_name_is_given_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{}\n")
    assert compose(["data=file", f"data.path={name}", f"run_dir=to {name}"]).job.data.path == name
    (problem,) = problems("data=file", f"data.path=no {name}")
    assert problem.key == "data.path" and problem.message.startswith("there is no such file here")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_a_link_to_what_is_not_there_is_said_to_be_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text("{}\n")
    (tmp_path / name).symlink_to("moved/away.jsonl")
    (problem,) = problems("data=file", f"data.path={name}")
    assert problem.message == "is a link to moved/away.jsonl, which is not there"


def test_a_part_of_a_split_needs_no_quotes_but_the_shells():
    assert compose(["data=file", "data.path=a/b", "data.split=train[:20%]"]).job.data.split == "train[:20%]"


def test_a_pattern_is_answered_with_the_folder_and_not_with_a_file_of_nearly_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("{}\n")
    (problem,) = problems("data=file", "data.path=rows/*.jsonl")
    assert problem.remedy == "patterns are not expanded here: name a folder, data.path=rows or files, data.path=[A,B]"
    (problem,) = problems("data=file", "data.path=rows/a.jsonl", "data.validation=?.jsonl")
    assert problem.remedy == "patterns are not expanded here: name a folder, data.validation=."


def test_a_shipped_file_that_is_none_is_answered_with_those_that_are():
    (problem,) = problems("data=file", "data.path=shipped:tickets/trian.jsonl")
    assert problem.remedy == "data.path=shipped:tickets/train.jsonl"
    (problem,) = problems("data=file", "data.path=shipped:nope")
    assert problem.remedy.startswith("shipped are shipped:tickets/labels_train.jsonl, ")


def test_a_path_with_a_slash_too_many_is_the_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/mine.jsonl").write_text("{}\n")
    (problem,) = problems("data=file", "data.path=/rows/mine.jsonl")
    assert problem.remedy == "data.path=rows/mine.jsonl"


@pytest.mark.parametrize("stage", ["plan", "bundle"])
def test_a_pipe_is_no_data(stage: str, tmp_path: Path):
    os.mkfifo(tmp_path / "rows.jsonl")
    (problem,) = problems("data=file", f"data.path={tmp_path}/rows.jsonl", f"stop_after={stage}")
    assert problem.message == "is a pipe, and data are read more than once"
    assert problem.remedy.endswith("and data.path=rows.jsonl")


def test_what_cannot_be_read_is_not_called_missing_besides():
    assert [p.key for p in problems("data=file", "data.path={x")] == ["data.path"]


@pytest.mark.parametrize("argument", [
    f"model.path={'m' * 300}", f"endpoint.arrivals={'a' * 300}.csv", f"recipe=/{'x' * 300}/y",
    f"data.path={'[' * 3000}{']' * 3000}",
])
def test_names_too_long_for_a_disk_and_lists_too_deep_to_read_are_problems(argument):
    key = argument.partition("=")[0]
    assert key in {problem.key for problem in problems(argument)}


def test_a_name_too_long_for_a_disk_is_data_that_is_not_here(tmp_path):
    from loadmaster.data.sources import _local_files
    from loadmaster.pipeline import data_identity

    job = compose(["data=file", f"data.path={'d' * 300}", "data.validation=0.05"]).job
    assert _local_files(job.data.path, "data.path") is None
    assert data_identity(job) == [f"hub:{job.data.path}"]


def test_a_run_is_of_the_text_of_its_chat_template(tmp_path):
    from loadmaster.pipeline import data_identity

    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    job = compose(["stop_after=plan", f"model.chat_template={tmp_path / 'mine.jinja'}"]).job
    before = data_identity(job)
    (tmp_path / "mine.jinja").write_text("{{ messages[0] }}")
    assert data_identity(job) != before


def test_names_of_a_mapping_are_led_to_it():
    for word in ("columns", "column_map"):
        with pytest.raises(ConfigError, match=r"fix: data\.columns\.prompt=q"):
            compose([f"{word}={{prompt: q}}"])


def test_columns_the_other_way_round_are_turned():
    with pytest.raises(ConfigError, match=r"fix: our name first: 'data\.columns=\{prompt: Customer Question\}'"):
        compose(["data=file", "data.path=my.csv", "data.columns={Customer Question: prompt}"])


def test_a_value_with_an_apostrophe_is_quoted_as_a_shell_takes_it():
    with pytest.raises(ConfigError) as caught:
        compose(["data=file", "data.path=sp ace/it's.jsonl"])
    (problem,) = caught.value.problems
    assert shlex.split(problem.remedy.rpartition("Hydra: ")[2]) == ['data.path="sp ace/it\'s.jsonl"']
