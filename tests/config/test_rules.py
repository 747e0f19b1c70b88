"""Each rule of the table refuses what it says, names the key to change, and lets the right thing pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster import catalog
from loadmaster.config.compose import compose
from loadmaster.config.fields import is_apples, nearest_card
from loadmaster.config.rules import RULES
from loadmaster.errors import ConfigError
from tests.runs import PLAIN, environment

PLAN = "stop_after=plan"
OWN = ["data=file", "data.path=own.jsonl", "data.format=messages"]

# rule -> (arguments it refuses, key it blames, part of the remedy, arguments that pass)
CASES = {
    "data_files_exist": (
        ["data=file", "data.path=trian.jsonl"], "data.path", "data.path=train.jsonl",
        ["data=file", "data.path=train.jsonl"],
    ),
    "validation_is_held_out": (
        ["data.path=train.jsonl", "data.validation=train.jsonl"], "data.validation", "data.validation=0.05",
        ["data.path=train.jsonl", "data.validation=0.05"],
    ),
    "own_data_is_held_out_of_itself": (
        ["data.path=train.jsonl"], "data.path", "data=file data.path=train.jsonl",
        ["data=file", "data.path=train.jsonl"],
    ),
    "best_checkpoint_is_known_and_kept": (
        ["checkpoint.load_best=true", "evaluation.every_steps=7"], "evaluation.every_steps",
        "evaluation.every_steps=auto",
        ["checkpoint.load_best=true", "evaluation.every_steps=5", "checkpoint.every_steps=10"],
    ),
    "patience_has_evaluations": (
        ["evaluation.patience=3", "evaluation.every_steps=null"], "evaluation.every_steps",
        "evaluation.every_steps=auto", ["evaluation.patience=3", "evaluation.every_steps=5"],
    ),
    "warm_up_ends_within_the_run": (
        ["optimizer.warmup_steps=50", "max_steps=50"], "optimizer.warmup_steps", "optimizer.warmup_steps=5",
        ["optimizer.warmup_steps=50", "max_steps=51"],
    ),
    "tensorboard_writes_into_the_run": (
        ["tracker.project=../../mine"], "tracker.project", "tracker.project=mine", ["tracker.project=team/mine"],
    ),
    "chat_template_is_a_file": (
        ["model.chat_template=chatml"], "model.chat_template", "null: the model's own",
        ["model.chat_template=train.jsonl"],
    ),
    "task_has_held_out_rows": (
        ["evaluation.task=exact_match", "data.validation=null"], "evaluation.task", "data.validation=0.05",
        ["evaluation.task=none", "data.validation=null"],
    ),
    "task_has_answers": (
        ["evaluation.task=exact_match", "data.format=text"], "evaluation.task", "evaluation.task=none",
        ["evaluation.task=none", "data.format=text"],
    ),
    "kto_of_all_weights_is_packed": (
        ["data=ticket_labels", "method=full", "data.packing=false"], "data.packing", "data.packing=true, or method=",
        ["data=ticket_labels", "method=full"],
    ),
    "pairs_go_with_a_preference_objective": (
        ["data.format=preference"], "data.format", "objective=dpo", ["data.format=preference", "objective=orpo"],
    ),
    "labelled_answers_are_ktos": (
        ["data=ticket_pairs", "data.format=unpaired"], "data.format", "objective=kto, or data.format=preference",
        ["data=ticket_labels"],
    ),
    "judged_answers_are_not_split": (
        ["data=ticket_pairs", "data.on_long_row=split"], "data.on_long_row", "data.on_long_row=drop",
        ["data=ticket_pairs", "data.on_long_row=refuse"],
    ),
    "servers_read_the_formats": (
        ["export.formats=[nvfp4]", "endpoint.server=vllm==0.11.2"], "export.formats",
        "endpoint.server=vllm==0.14.0 or newer",
        ["export=nvfp4", "endpoint.server=vllm==0.14.0"],
    ),
    "beta_is_for_preferences": (
        ["preference.beta=0.3"], "preference.beta", "objective=dpo, kto or orpo",
        ["data=ticket_pairs", "preference.beta=0.3"],
    ),
    "label_smoothing_is_dpos": (
        ["preference.label_smoothing=0.1"], "preference.label_smoothing", "objective=dpo",
        ["objective=dpo", "data.format=preference", "preference.label_smoothing=0.1"],
    ),
    "answer_weights_are_ktos": (
        ["data=ticket_pairs", "preference.desirable_weight=2"], "preference.desirable_weight", "objective=kto",
        ["data=ticket_pairs", "objective=kto", "preference.desirable_weight=2"],
    ),
    "servers_load_no_whole_modules": (
        ["lora.modules_to_save=[lm_head]", "export=adapter"], "lora.modules_to_save", "endpoint.serve_as=bf16",
        ["lora.modules_to_save=[lm_head]", "export.formats=[adapter,bf16]"],
    ),
    "servers_load_no_dora": (
        ["lora.dora=true", "method=lora", "export=adapter", "endpoint.serve_as=adapter"], "lora.dora",
        "endpoint.serve_as=bf16", ["lora.dora=true", "method=lora", "export.formats=[adapter,bf16]"],
    ),
    "bundles_hold_what_a_server_loads": (
        ["export.formats=[gguf]"], "export.formats", "stop_after=export", ["export.formats=[gguf]", PLAN],
    ),
    "dora_reads_whole_weights": (
        ["lora.dora=true", "method=qlora"], "lora.dora", "method=lora",
        ["lora.dora=true", "method=lora", "lora.dropout=0.05"],
    ),
    "qlora_is_not_fp8": (["method=qlora", "precision=fp8"], "precision", "precision=bf16", ["method=qlora"]),
    "fp8_products_take_sixteens": (
        ["method=full", "precision=fp8", "hardware=h100_80gb_x1", "sequence_length=1000"], "sequence_length",
        "sequence_length=1008",
        ["method=full", "precision=fp8", "hardware=h100_80gb_x1", "sequence_length=1008"],
    ),
    "fp8_needs_fp8_units": (
        ["precision=fp8", "hardware=a100_80gb_x1"], "precision", "h100_80gb",
        ["precision=fp8", "hardware=h100_80gb_x1"],
    ),
    "some_layers_are_checkpointed_in_full": (
        ["checkpointed_layers=8"], "checkpointed_layers", "activation_checkpointing=full",
        ["checkpointed_layers=8", "activation_checkpointing=full"],
    ),
    "pieces_are_not_compiled": (
        ["compile=true", "activation_checkpointing=offload", "sequence_length=20000"],
        "compile", "activation_checkpointing=full",
        ["compile=true", "activation_checkpointing=offload", "sequence_length=16384"],
    ),
    "gpu_is_known": (["hardware.gpu=h100"], "hardware.gpu", "hardware.gpu=h100_80gb", ["hardware.gpu=h100_80gb"]),
    "several_gpus_are_synchronised": (
        ["sharding=none", "hardware=h100_80gb_x8"], "sharding", "sharding=ddp",
        ["sharding=fsdp", "hardware=h100_80gb_x1"],
    ),
    "zero_steps_by_adamw": (
        ["sharding=zero3", "optimizer.name=adafactor", "hardware=h100_80gb_x8"], "optimizer.name", "sharding=fsdp",
        ["sharding=fsdp", "optimizer.name=adafactor", "hardware=h100_80gb_x8"],
    ),
    "stepped_in_the_backward_pass": (
        ["optimizer.in_backward=true", "optimizer.max_grad_norm=1"],
        "optimizer.in_backward", "optimizer.max_grad_norm=0",
        ["optimizer.in_backward=true", "optimizer.max_grad_norm=0"],
    ),
    "zero3_gathers_module_by_module": (
        ["sharding=zero3", "compile=true", "hardware=h100_80gb_x8"], "sharding", "sharding=fsdp",
        ["sharding=zero2", "compile=true", "hardware=h100_80gb_x8"],
    ),
    "micro_batch_within_global_batch": (
        ["micro_batch_size=4", "batch.global_size=16", "hardware=h100_80gb_x8"], "micro_batch_size",
        "micro_batch_size=2, or batch.global_size=32",
        ["micro_batch_size=2", "batch.global_size=16", "hardware=h100_80gb_x8"],
    ),
    "noise_is_for_answers": (
        ["data=ticket_pairs", "neftune_alpha=5"], "neftune_alpha", "objective=sft", ["neftune_alpha=5"],
    ),
    "servers_load_the_rank": (
        ["method=lora", "lora.rank=1024", "export=adapter", "endpoint.serve_as=adapter"], "lora.rank", "lora.rank=512",
        ["method=lora", "lora.rank=1024", "export=bf16"],
    ),
    "lora_settings_have_an_adapter": (
        ["method=full", "lora.rank=4"], "lora.rank", "leave out lora.rank", ["recipe=lora_8b", "method=full"],
    ),
    "constant_rate_has_no_minimum": (
        ["optimizer.schedule=constant", "optimizer.min_lr_ratio=0.1"], "optimizer.min_lr_ratio", "cosine",
        ["optimizer.schedule=linear", "optimizer.min_lr_ratio=0.1"],
    ),
    "only_wsd_has_a_decay_of_its_own": (
        ["optimizer.schedule=linear", "optimizer.decay_ratio=0.1"], "optimizer.decay_ratio", "optimizer.schedule=wsd",
        ["optimizer.schedule=wsd", "optimizer.decay_ratio=0.2", "optimizer.min_lr_ratio=0.1"],
    ),
    "the_rate_rises_before_it_falls": (
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=30", "max_steps=100", "optimizer.decay_ratio=0.8"],
        "optimizer.decay_ratio", "optimizer.decay_ratio=0.7,",
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=30", "max_steps=100", "optimizer.decay_ratio=0.7"],
    ),
    "full_has_no_adapter": (
        ["method=auto", "plan.methods=[full]", "export.formats=[adapter]"], "export.formats", "export=bf16",
        ["method=lora", "export=adapter"],
    ),
    "something_is_exported": (["export.formats=[]"], "export.formats", "stop_after=evaluate", ["export.formats=[fp8]"]),
    "server_is_known": (
        ["endpoint.server=vllm==0.7.3"], "endpoint.server", "endpoint.server=vllm==0.8.5",
        ["endpoint.server=vllm==0.27.1"],
    ),
    "served_format_is_exported": (
        ["endpoint.serve_as=fp8", "export=int4"], "endpoint.serve_as", "export.formats=[bf16,int4,fp8]",
        ["endpoint.serve_as=fp8", "export=fp8"],
    ),
    "endpoint_gpu_is_known": (["endpoint.gpu=h100"], "endpoint.gpu", "endpoint.gpu=h100_80gb", ["endpoint.gpu=l40s"]),
    "usual_request_fits_the_longest": (
        ["endpoint.prompt_tokens=500", "endpoint.output_tokens=100", "endpoint.max_model_len=512"],
        "endpoint.prompt_tokens", "endpoint.max_model_len=600",
        ["endpoint.prompt_tokens=500", "endpoint.output_tokens=100", "endpoint.max_model_len=600"],
    ),
    "workers_have_an_order": (
        ["endpoint.min_workers=3", "endpoint.max_workers=2"], "endpoint.min_workers", "endpoint.max_workers=3",
        ["endpoint.min_workers=2", "endpoint.max_workers=2"],
    ),
    "baked_weights_are_in_our_own_image": (
        ["endpoint.weights=image"], "endpoint.weights", "endpoint.worker=handler",
        ["endpoint.weights=image", "endpoint.worker=handler"],
    ),
    "arrivals_are_known": (
        ["endpoint.arrivals=steady"], "endpoint.arrivals", "poisson, bursty", ["endpoint.arrivals=bursty"],
    ),
    "other_machines_need_a_way_to_them": (
        ["launch.hosts=[gpu1]"], "launch.hosts", "launch=ssh", ["launch=ssh", "launch.hosts=[gpu1]"],
    ),
    "auto_has_methods_to_choose_from": (
        ["method=auto", "plan.methods=[]"], "plan.methods", "plan.methods=[full,lora,qlora]",
        ["method=auto", "plan.methods=[qlora]"],
    ),
    "prices_are_of_known_gpus": (
        ["plan.prices_usd_per_hour={h100: 2.5}"], "plan.prices_usd_per_hour", "h100_80gb",
        ["plan.prices_usd_per_hour={h100_80gb: 2.5}"],
    ),
    "model_folder_exists": (["model.path=empty"], "model.path", "config.json", ["model.path=model"]),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with train.jsonl, a model with a config.json, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")


def test_every_rule_of_the_table_has_a_case():
    assert sorted(rule.name for rule in RULES) == sorted(CASES)
    assert all(rule.explanation.endswith((".", ")")) for rule in RULES)


@pytest.mark.parametrize("name", CASES)
def test_the_rule_refuses_what_it_says_and_names_the_remedy(name: str):
    refused, key, remedy, _ = CASES[name]
    with pytest.raises(ConfigError) as caught:
        compose(refused)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert problem.origin == "command line"
    assert remedy in problem.remedy


@pytest.mark.parametrize("name", CASES)
def test_the_rule_lets_the_right_thing_pass(name: str):
    compose(CASES[name][3])


@pytest.mark.parametrize("words", [["lora.dora=true"], ["lora.modules_to_save=[lm_head]"]])
def test_an_adapter_that_no_server_loads_is_refused_where_it_would_be_served(words: list[str]):
    with pytest.raises(ConfigError, match="where it is merged"):
        compose([*words, "method=lora", "export.formats=[adapter,bf16]", "endpoint.serve_as=adapter"])
    compose([*words, "method=lora", "export=adapter", "stop_after=export"])


def test_an_answer_that_is_longer_than_the_longest_request_is_named_itself():
    with pytest.raises(ConfigError) as caught:
        compose(["endpoint.output_tokens=600", "endpoint.max_model_len=512"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("endpoint.output_tokens", 600)


def test_dropout_of_adapters_is_noise_between_two_answers():
    with pytest.raises(ConfigError) as caught:
        compose(["data=ticket_pairs", "lora.dropout=0.05"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.remedy) == ("lora.dropout", "lora.dropout=0, or objective=sft")
    compose(["data=ticket_pairs"])


@pytest.mark.parametrize("typed", ["launch.gpus=[l40s]", "launch.env.A=b", "launch.volume=null", "launch.yes=true"])
def test_a_launch_that_is_typed_and_would_not_be_made_is_refused(typed: str):
    with pytest.raises(ConfigError) as caught:
        compose([typed])
    (problem,) = caught.value.problems
    assert problem.message == "has no effect with launch=local" and problem.remedy.startswith("launch=runpod")
    compose([typed, "launch=runpod"])


def test_a_recipe_that_says_how_it_is_launched_runs_here_too(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("# @package _global_\nlaunch:\n  gpus: [l40s]\n")
    assert compose(["recipe=mine"]).job.launch.gpus == ["l40s"]
    compose(["launch.max_hours=3", "launch.max_usd=5", "launch.grace_s=9", "launch.hang_timeout_s=60"])


@pytest.mark.parametrize(
    ("words", "works"),
    [
        (["objective=dpo"], "data=ticket_pairs, or objective=sft"),
        (["objective=kto"], "data=ticket_pairs or ticket_labels, or objective=sft"),
        (["data=ticket_labels", "objective=dpo"], "objective=kto, or data=ticket_pairs"),
        (["data=ticket_labels", "objective=sft"], "objective=kto, or data=tickets"),
        (["objective=dpo", *OWN], "data.format=preference and rows with chosen and rejected answers, or objective=sft"),
        (["objective=kto", *OWN], "data.format=preference or unpaired and rows with"),
    ],
)
def test_what_an_objective_takes_is_all_named_beside_other_data(words: list[str], works: str):
    with pytest.raises(ConfigError) as caught:
        compose([*words, PLAN])
    assert caught.value.problems[0].remedy.startswith(works)


def test_a_model_may_be_on_the_hosts_alone():
    for name, words in (("ssh", ["launch.hosts=[gpu1]"]), ("slurm", [])):
        assert compose(["model.path=/only/there", f"launch={name}", *words]).job.model.path == "/only/there"
        with pytest.raises(ConfigError, match="is not a folder here"):
            compose(["model.path=there", f"launch={name}", *words])


def test_a_plan_needs_no_data_here():
    there = "/data/on/the/cluster.jsonl"
    assert compose(["data=file", f"data.path={there}", PLAN]).job.data.path == there


@pytest.mark.parametrize(("name", "meant"), [("vlm", "vllm"), ("vLLM", "vllm"), ("sg-lang", "sglang"), ("x", "vllm")])
def test_a_server_that_is_none_is_answered_with_the_one_that_is_meant(name: str, meant: str):
    with pytest.raises(ConfigError) as caught:
        compose([f"endpoint.server={name}"])
    assert caught.value.problems[0].remedy == f"endpoint.server={meant}"


def test_a_card_is_meant_by_the_words_of_its_name():
    meant = {"h100": "h100_80gb", "a100_pcie": "a100_80gb_pcie", "H100-NVL": "h100_nvl", "h100_nvl_94gb": "h100_nvl",
             "4090": "rtx4090", "RTX_3090": "rtx3090", "a6000": "rtx_a6000", "a10": "a10g", "l40": "l40s",
             "RTX 4090": "rtx4090", "H100 NVL": "h100_nvl", "NVIDIA A100-SXM4-40GB": "a100_40gb", "GB200": "b200",
             "nvidia l40s": "l40s", "RTX 6000 Ada": "rtx_6000_ada", "GeForce RTX 4090": "rtx4090",
             "gtx4090": "rtx4090"}
    assert {word: nearest_card(word, catalog.gpus()) for word in meant} == meant


@pytest.mark.parametrize(
    "other",
    ["t4", "v100", "Tesla V100-SXM2-16GB", "a30", "h800", "h20", "h10", "b100", "rtx4080", "RTX 3080", "mi300x", ""],
)
def test_a_card_of_another_number_is_not_meant(other: str):
    assert nearest_card(other, catalog.gpus()) is None


@pytest.mark.parametrize("key", ["hardware.gpu", "endpoint.gpu", "plan.prices_usd_per_hour"])
def test_a_card_that_is_like_none_of_the_catalogue_is_taken_for_none(key: str):
    for name, begins in {"v100": "known are ", "t4": "known are ", "h100_sxm": "h100_80gb; known are "}.items():
        with pytest.raises(ConfigError) as caught:
            compose([f"{key}={{{name}: 2}}" if "prices" in key else f"{key}={name}"])
        (problem,) = caught.value.problems
        assert problem.remedy.removeprefix(f"{key}=").startswith(begins) and "a100_80gb" in problem.remedy


@pytest.mark.parametrize("name", ["mps", "Metal", "apple_m3_max", "m2", "m1-ultra", "M4 Pro"])
def test_an_apple_gpu_is_said_not_to_be_used(name: str):
    for key in ("hardware.gpu", "hardware"):
        with pytest.raises(ConfigError) as caught:
            compose([f"{key}='{name}'"])
        (problem,) = caught.value.problems
        assert "Apple's, which is not used" in problem.message and problem.remedy.startswith("hardware=cpu")
    assert not any(map(is_apples, catalog.gpus())) and not is_apples("m40") and not is_apples("m60")


def test_a_warm_up_as_long_as_the_run_is_one_problem_with_every_schedule():
    for schedule in ("cosine", "wsd"):
        with pytest.raises(ConfigError) as caught:
            compose([f"optimizer.schedule={schedule}", "optimizer.warmup_steps=12", "max_steps=10"])
        assert [problem.key for problem in caught.value.problems] == ["optimizer.warmup_steps"]


def test_another_split_of_the_hub_dataset_is_held_out_and_the_same_is_refused():
    words = ["data=file", "data.path=owner/name", "data.validation=owner/name"]
    compose(words)
    with pytest.raises(ConfigError) as caught:
        compose([*words, "data.validation_split=train"])
    (problem,) = caught.value.problems
    assert problem.key == "data.validation_split" and "data.validation_split=NAME" in problem.remedy


def test_a_hub_dataset_is_not_taken_for_a_missing_file():
    assert compose(["data=file", "data.path=owner/dataset"]).job.data.path == "owner/dataset"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=file", f"data.path={'long' * 99}.jsonl"], "there is no such file"),
        (["data=file", f"data.path={'long' * 99}/rows.jsonl"], "there is no such file"),
        ([f"model.path={'long' * 99}", "model.name=me/mine"], "is not a folder here"),
        ([f"model={'long' * 99}/x"], "there is no model of this name"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_missing_file(words: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert said in caught.value.problems[0].message


def test_a_missing_file_in_a_missing_folder_says_where_it_looked():
    with pytest.raises(ConfigError) as caught:
        compose(["data=file", "data.path=data/train.jsonl"])
    assert f"relative to where the command is run ({Path.cwd()})" in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    "words",
    [
        ["data=file", "data.path=mine.jsonl", PLAN], ["data=file", "data.path=folder"],
        ["data=file", "data.path=open", PLAN],
    ],
)
def test_data_that_may_not_be_read_is_named_before_anything_starts(words: list[str], tmp_path: Path):
    (tmp_path / "mine.jsonl").touch(0o200)
    (tmp_path / "folder").mkdir(0o600)
    (tmp_path / "open").mkdir()
    (tmp_path / "open/rows.jsonl").touch(0o200)
    for other in ("open/lost+found", "open/.git"):
        (tmp_path / other).mkdir(0o200)  # of a volume, and of a checkout
    (tmp_path / "open/a.txt").touch(0o200)
    asked = f"from loadmaster.config.compose import compose; compose({words})"
    done = subprocess.run(
        [*PLAIN, sys.executable, "-c", asked], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    named = {"open": "open/rows.jsonl"}.get(place := words[1].partition("=")[2], place)
    assert f"you may not read {tmp_path / named}\n" in done.stderr and "1 problem:" in done.stderr


def test_own_data_beside_shipped_held_out_rows_is_refused_where_nobody_asked_for_these():
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=smoke", "data.path=owner/dataset"])
    (problem,) = caught.value.problems
    assert "data=file data.path=owner/dataset" in problem.remedy and "data.validation=0.05" in problem.remedy
    for words in (
        ["recipe=smoke", "data.path=owner/dataset", "data.validation=0.05"],
        ["data=file", "data.path=owner/dataset", "data.validation=shipped:tickets/validation.jsonl"],
        ["recipe=smoke", "data.path=[train.jsonl,shipped:tickets/train.jsonl]"],
    ):
        compose(words)


def test_a_file_that_sets_own_data_and_shipped_held_out_rows_means_it(tmp_path: Path):
    both = "data:\n  path: train.jsonl\n  validation: shipped:tickets/validation.jsonl\n"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("# @package _global_\n" + both)
    assert compose(["recipe=mine"]).job.data.path == "train.jsonl"
    (tmp_path / "recipes/mine.yaml").write_text("# @package _global_\ndata:\n  path: train.jsonl\n")
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=mine"])
    assert [(p.key, p.origin) for p in caught.value.problems] == [("data.path", "recipes/mine.yaml:3")]


def test_lora_settings_of_the_same_recipe_as_method_full_are_refused_with_their_line():
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("method: full\nlora:\n  rank: 4\n")
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=mine"])
    assert [(p.key, p.value, p.origin) for p in caught.value.problems] == [("lora.rank", 4, "recipes/mine.yaml:3")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "holds nothing"),
        (b"\xff\xfe{", "is no text in UTF-8"),
        (b"{{ messages }}\n{{ x | tojsn }}", "is broken in line 2: No filter named 'tojsn'."),
        (b"{% if messages %}{% break %}{% endif %}", "is broken: 'break' outside loop"),
        (b"{{ " + b"(" * 2000 + b")" * 2000 + b" }}", "is broken: maximum recursion depth exceeded"),
    ],
)
def test_a_chat_template_is_text(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        compose([f"model.chat_template={tmp_path / 'mine.jinja'}"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.message) == ("model.chat_template", said)


def test_a_chat_template_may_have_what_transformers_adds_to_jinja(tmp_path: Path):
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    compose([f"model.chat_template={tmp_path / 'mine.jinja'}"])
