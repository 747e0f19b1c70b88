"""The stages in order, skipped when unchanged, refused when they would mix runs; in process, on a tiny model."""

import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loadmaster.cli import main
from loadmaster.config.compose import compose
from loadmaster.config.schema import STAGES
from loadmaster.errors import ConfigError, LoadmasterError, StoppedOnRequest
from loadmaster.files import sha256_of_model, write_json
from loadmaster.pipeline import Pipeline, command_line, run
from loadmaster.preflight import hardware
from loadmaster.preflight.plan import Plan
from loadmaster.rundir import RunDir
from loadmaster.training.display import Display
from loadmaster.training.rehearsal import Rehearsed
from tests.conftest import FEW_WORDS
from tests.forks import fork_ranks
from tests.runs import PLAIN, command, environment, finish

RECIPES = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
EXPORTED = {"qlora_8b", "lora_8b", "full_8b"}
"""The first of each method: what others would export, scaled down, is one of these. Exports take a process each:
of the three, lora_8b's is here, and the other two with the slow tests; their methods are trained here by others."""
# What makes any recipe small enough for two CPU cores; everything else is the recipe's own.
SCALED_DOWN = [
    "hardware=cpu",
    "precision=fp32",
    "sequence_length=64",
    "max_steps=2",
    "data.max_rows=24",
    "data.validation=0.25",
    "evaluation.max_rows=2",
    "evaluation.max_new_tokens=4",
    "tracker=none",
    "export=bf16",
    "batch.global_size=2",
    "sharding=none",
    "offload=none",
    "micro_batch_size=1",
    "data=tickets",
    "optimizer.name=adamw",
    "activation_checkpointing=auto",
    "export.thresholds={bf16: {min_task_retention: 0, max_perplexity_ratio: 1.1, "
    "max_mean_kl: 0.1, min_top1_agreement: 0.9}}",
]


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


def go(tiny, tmp_path, *overrides) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=120)
    composed = compose([f"model.path={tiny}", f"run_dir={tmp_path / 'run'}", *SCALED_DOWN, *overrides])
    return run(composed, console), console.file.getvalue()


def test_cards_are_numbered_as_the_plan_numbers_them_before_anything_asks_for_one(tiny, tmp_path, monkeypatch):
    """Of an RTX 4090 behind a larger, slower card CUDA makes the first; what was planned for has twice the memory."""
    seen = []

    def gather(job):
        seen.append((os.environ["CUDA_DEVICE_ORDER"], "GOMP_SPINCOUNT" in os.environ))
        raise LoadmasterError("that will do")

    monkeypatch.setattr("loadmaster.pipeline.Team.gather", gather)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert go(tiny, tmp_path)[0] == LoadmasterError.exit_code
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert go(tiny, tmp_path)[0] == LoadmasterError.exit_code
    assert seen == [("PCI_BUS_ID", True), ("FASTEST_FIRST", True)]
    for words in (["doctor"], ["serve-check", str(tmp_path)]):  # on their own they number them alike
        monkeypatch.delenv("CUDA_DEVICE_ORDER")
        main(words)
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    script = "import sys, loadmaster.pipeline; sys.exit('torch' in sys.modules)"  # libraries read these as they load
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_plan_for_a_card_is_not_trained_where_there_is_none(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loadmaster.pipeline.detect_local", hardware.cpu)
    assert go(tiny, tmp_path, "hardware=h100_80gb_x1", "precision=bf16")[0] == ConfigError.exit_code
    assert "the plan is for it, and this machine has no GPU\n" in capsys.readouterr().err


def test_a_plan_is_shown_while_another_process_works_in_its_folder_and_not_kept(tiny, tmp_path):
    with RunDir(tmp_path / "run", "").locked():
        code, output = go(tiny, tmp_path, "stop_after=plan")
    assert code == 0 and "(0.336 million parameters) on" in output, output
    assert output.endswith(f"this plan is not kept: another process works in {tmp_path / 'run'}\n")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_plan_for_other_hardware_leaves_what_was_trained_with_its_own(tiny, tmp_path):
    def plan(*words: str) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=120)
        job = [f"model.path={tiny}", f"run_dir={tmp_path / 'run'}", "recipe=lora_8b", "stop_after=plan", *words]
        return run(compose(job), console), console.file.getvalue()

    def files() -> dict[str, bytes]:
        return {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "plan.json", "stages.json")}

    assert plan("hardware=h200_x1")[0] == 0
    first = files()
    assert plan("hardware=l40s_x1")[0] == 0 and files() != first  # nothing is trained: the last plan counts
    (tmp_path / "run/checkpoints").mkdir()
    kept = files()
    code, output = plan("hardware=h200_x1")
    assert code == 0 and "on 1x h200" in output and files() == kept
    assert output.endswith(f"what {tmp_path / 'run'} holds is trained by the plan that is there\n")
    (tmp_path / "run/plan.json").write_text("{")  # not whole: it is made anew
    assert plan("hardware=h200_x1")[0] == 0 and files()["plan.json"] == first["plan.json"]


@pytest.fixture(scope="module")
def lora_8b(tiny, tmp_path_factory) -> tuple[Path, int, str]:
    """(folder, exit code, output) of a run to its end, which a later test goes on with."""
    folder = tmp_path_factory.mktemp("lora_8b")
    return folder, *go(tiny, folder, "recipe=lora_8b")


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r in EXPORTED - {"lora_8b"})) for r in RECIPES]
)
def test_every_shipped_recipe_runs_scaled_down(recipe, tiny, tmp_path, request):
    stages = STAGES if recipe in EXPORTED else STAGES[: STAGES.index("evaluate") + 1]
    if recipe == "lora_8b":
        tmp_path, code, output = request.getfixturevalue("lora_8b")
    else:
        code, output = go(tiny, tmp_path, f"recipe={recipe}", f"stop_after={stages[-1]}")
    assert code == 0, output
    folder = tmp_path / "run"
    job = compose([f"recipe={recipe}"]).job
    plan = Plan.read(folder / "plan.json")
    assert plan.fits and plan.method == (plan.method if job.method == "auto" else job.method)
    assert {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "checkpoints",
        "eval.json",
        "report.html",
        "result.json",
    } <= {p.name for p in folder.iterdir()}
    trained = folder / ("model" if plan.method == "full" else "adapter")
    if "bundle" in stages:
        assert (folder / "export" / "bf16" / "manifest.json").is_file() and (folder / "bundle").is_dir()
        assert output.splitlines()[-1].startswith((f"next: loadmaster deploy {folder}", "next: the commands in"))
    result = json.loads((folder / "result.json").read_text())
    assert {
        "peak_allocated_gib",
        "peak_reserved_gib",
        "peak_device_gib",
        "predicted_gib",
        "tokens_per_second",
        "trained_tokens_per_second",
        "mfu",
        "steps",
        "train_loss",
        "eval_loss",
        "wall_seconds",
    } <= set(result)
    assert result["attention_kernel"] == "by_document"
    assert result["steps"] == 2 and set(result["wall_seconds"]) == set(stages)
    assert result["trained_sha256"] == sha256_of_model(trained) != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, spread",
    [
        (2, ("sharding=fsdp", "offload=all")),
        (4, ("sharding=fsdp", "batch.global_size=4")),
        (2, ("sharding=zero2",)),
        (2, ("sharding=zero3", "offload=all")),
    ],
    ids=["fsdp-2-offload", "fsdp-4", "zero2-2", "zero3-2-offload"],
)
def test_full_70b_scaled_down_runs_on_several_processes(count, spread, tiny, tmp_path):
    last = "bundle" if count == 4 else "evaluate"  # what was trained is exported by one process, however many they were
    with fork_ranks():  # how they are started as what they are is seen elsewhere (tests/training/test_workers.py)
        code, output = go(tiny, tmp_path, "recipe=full_70b", f"hardware.count={count}", f"stop_after={last}", *spread)
    assert code == 0, output
    folder = tmp_path / "run"
    plan = Plan.read(folder / "plan.json")
    assert (plan.method, plan.world_size, plan.sharding) == ("full", count, spread[0].partition("=")[2])
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "eval.json").is_file()
    if last == "bundle":
        assert (folder / "export" / "bf16" / "manifest.json").is_file() and (folder / "bundle").is_dir()


def test_a_token_that_the_model_has_no_embedding_for_is_refused_before_it_is_loaded(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": FEW_WORDS, "content": "<mine>", **added})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{word} <mine> of it"}) + "\n" for word in ("some", "all")))
    words = ("data=file", f"data.path={rows}", "data.validation=null", "evaluation.task=none", "stop_after=train")
    assert go(other, tmp_path, *words)[0] == 2
    said = capsys.readouterr().err
    assert f"the data hold '<mine>', token {FEW_WORDS:,}" in said and f"has embeddings for {FEW_WORDS:,}" in said


def test_a_second_start_skips_what_is_unchanged_and_redoes_what_is_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Display, "PLAIN_EVERY_S", 0.0)
    first = go(tiny, tmp_path, "stop_after=evaluate")[1]
    assert "skipped" not in first
    assert first.count(" of 2 answers") == first.count(" answers before training\n") + first.count(" after training\n")
    assert first.count("  2 of 2 answers before training\n") == first.count("  2 of 2 answers after training\n") == 1
    run = tmp_path / "run"
    said = [f"report: {run / 'report.html'}", f"next: loadmaster chat {run} (talks to what was trained)"]
    said += [f"next: loadmaster bundle {run} (goes on with export, bundle: what an endpoint needs)"]
    assert first.splitlines()[-3:] == said
    (tmp_path / "run/report.html").unlink()
    again = go(tiny, tmp_path, "stop_after=evaluate")[1]
    assert (tmp_path / "run/report.html").is_file()
    assert [f"{stage}: unchanged, skipped" in again for stage in ("plan", "train", "evaluate")] == [True] * 3
    changed = go(tiny, tmp_path, "stop_after=evaluate", "evaluation.max_new_tokens=5")[1]
    assert "train: unchanged, skipped" in changed and "evaluate: started" in changed
    (tmp_path / "run/eval.json").write_text('{"before": ')
    damaged = go(tiny, tmp_path, "stop_after=evaluate", "evaluation.max_new_tokens=5")[1]
    assert "train: unchanged, skipped" in damaged and "evaluate: done" in damaged
    assert set(json.loads((tmp_path / "run/eval.json").read_text())) == {"before", "after"}
    unscored = go(tiny, tmp_path, "stop_after=evaluate", "evaluation.task=none")[1]
    assert "answers to 6 held-out prompts before and after, to be read: in report.html and eval.json" in unscored
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert all(set(found[side]) == {"held_out", "samples"} for side in ("before", "after"))
    assert len(found["after"]["samples"]) == 6 and "Nothing scored them" in (tmp_path / "run/report.html").read_text()


def test_a_plan_by_which_nothing_was_trained_is_made_anew_and_one_of_a_run_is_shown_again(tiny, tmp_path):
    """Prices, and what the preflight knows, change; what is being trained goes on by its own plan."""
    file = tmp_path / "run/plan.json"

    def planned_again() -> tuple[str, float]:
        plan = json.loads(file.read_text())
        file.write_text(json.dumps({**plan, "tokens_per_second": 1e9}))
        return go(tiny, tmp_path, "stop_after=plan")[1], json.loads(file.read_text())["tokens_per_second"]

    first = go(tiny, tmp_path, "stop_after=plan")[1]
    assert "2 steps of 2 x 64 tokens: max_steps of the first 24 rows of shipped:tickets" in first
    output, speed = planned_again()
    assert "plan: done" in output and speed < 1e6
    assert go(tiny, tmp_path, "stop_after=train")[0] == 0
    output, speed = planned_again()
    assert "plan: unchanged, skipped" in output and "(0.336 million parameters) on" in output and speed == 1e9


def test_a_plan_that_fits_no_more_is_not_trained_by(tiny, tmp_path, monkeypatch, capsys):
    """Made anew it says so; the one before it, by which the run would have begun, is gone."""
    assert go(tiny, tmp_path, "stop_after=plan")[0] == 0
    monkeypatch.setattr(hardware, "host_memory_gib", lambda: 0.5)
    assert go(tiny, tmp_path, "stop_after=plan")[0] == 3
    assert "error: nothing fits; what came nearest" in capsys.readouterr().err
    monkeypatch.setattr(hardware, "local_gpus", list)
    assert go(tiny, tmp_path, "stop_after=plan", "hardware=local")[0] == 3
    assert "error: nothing fits on this machine, which has no GPU, or no driver that" in capsys.readouterr().err
    assert go(tiny, tmp_path, "stop_after=train")[0] == 3 and not (tmp_path / "run/checkpoints").exists()


def test_a_plan_that_was_damaged_is_made_anew_and_the_run_goes_on(tiny, tmp_path):
    assert go(tiny, tmp_path, "stop_after=train")[0] == 0
    file = tmp_path / "run/plan.json"
    whole = json.loads(file.read_text())
    for damaged in ("", '{"fits": [', "[1]", "{}"):
        file.write_text(damaged)
        with pytest.raises(LoadmasterError, match="holds no plan that can be read"):
            Plan.read(file)
        code, output = go(tiny, tmp_path, "stop_after=train")
        assert code == 0 and "plan: done" in output and "train: unchanged, skipped" in output, (damaged, output)
        assert json.loads(file.read_text()).keys() == whole.keys()


def test_another_model_than_was_planned_is_not_trained(tiny, smollm2, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base", copy_function=shutil.copyfile)
    assert go(base, tmp_path, "stop_after=plan")[0] == 0
    shutil.rmtree(base)
    shutil.copytree(smollm2, base, copy_function=shutil.copyfile)
    assert go(base, tmp_path, "stop_after=train")[0] == 2
    said = capsys.readouterr().err
    assert "num_hidden_layers=30, hidden_size=576" in said and "num_hidden_layers=2, hidden_size=64" in said
    assert "nothing was started" not in said and not (tmp_path / "run/checkpoints").exists()


def test_what_the_plan_cannot_judge_is_refused_before_training(tiny, tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("starcoder2", **sizes, num_key_value_heads=2, vocab_size=49152)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    words = ["method=full", "export.formats=[fp8_block]", "export.thresholds=null"]
    assert go(tmp_path / "base", tmp_path, *words)[0] == 2
    said = capsys.readouterr().err
    assert "export.formats = [fp8_block]   on the command line" in said and "is not a multiple of 128" in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_task_that_the_held_out_rows_cannot_be_asked_is_refused_before_training(tiny, tmp_path, capsys):
    rows = [{"instruction": f"{number}?", "input": "", "output": "no"} for number in range(9)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    mine = ["data=file", f"data.path={tmp_path / 'mine.json'}", "data.validation=0.3", "evaluation.task=json_fields"]
    assert go(tiny, tmp_path, "stop_after=evaluate", *mine)[0] == 2
    assert "json_fields needs references that are JSON objects" in capsys.readouterr().err
    reasons = json.loads((tmp_path / "run/plan.json").read_text())["reasons"]
    assert any("of mine.json" in reason for reason in reasons) and str(tmp_path) not in str(reasons)
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize(
    ("stage", "where", "remedy"),
    [
        ("train", "loadmaster.training.loop.Session.gradients", "activation_checkpointing=full"),
        ("evaluate", "loadmaster.evaluation.generate", "evaluation.batch_size"),
        ("export", "loadmaster.export.stage.Export.make", "evaluation.batch_size"),
    ],
)
def test_memory_that_runs_out_in_a_stage_is_a_sentence_and_the_next_start_goes_on(
    stage, where, remedy, tiny, tmp_path, monkeypatch, capsys
):
    def too_big(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    asked = ("evaluation.task=exact_match", "evaluation.max_rows=1", f"stop_after={stage}")
    with monkeypatch.context() as patch:
        patch.setattr(where, too_big)
        if stage == "train":  # where the rehearsal has no say
            patch.setattr("loadmaster.training.loop.rehearse_run", lambda *_: Rehearsed(0.0, 0.0, 0.0, 0.0))
        code, _ = go(tiny, tmp_path, *asked)
        said = capsys.readouterr().err
        assert code == 4 and f"out of GPU memory in the {stage} stage" in said and remedy in said
    if stage == "export":  # which takes a while
        return
    code, printed = go(tiny, tmp_path, *asked)
    assert code == 0 and (stage == "train" or "train: unchanged" in printed), printed


@pytest.mark.slow
def test_what_was_lost_is_made_again_not_reported_as_done(tiny, lora_8b, capsys):
    assert lora_8b[1] == 0
    folder = lora_8b[0] / "run"
    for weights in (folder / "export/bf16/model.safetensors", folder / "adapter/adapter_model.safetensors"):
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(bytes(damaged))
    assert go(tiny, lora_8b[0], "recipe=lora_8b")[0] == 5
    assert "adapter_model.safetensors changed since training wrote it" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(folder / "bundle")
    shutil.rmtree(folder / "adapter")
    code, output = go(tiny, lora_8b[0], "recipe=lora_8b")
    assert code == 0, output
    assert "plan: unchanged, skipped" in output and "evaluate: unchanged, skipped" in output
    assert all(f"{stage}: started" in output for stage in ("train", "export", "bundle"))
    assert (folder / "adapter").is_dir() and (folder / "bundle").is_dir()


@pytest.mark.slow
def test_trained_weights_that_were_damaged_are_made_again_from_the_checkpoint(tiny, tmp_path):
    for method, folder, config in (("lora", "adapter", "adapter_config.json"), ("full", "model", "config.json")):
        base, last = tmp_path / method, ("stop_after=train", f"recipe={method}_8b")
        assert go(tiny, base, *last)[0] == 0
        (weights,) = (base / "run" / folder).glob("*.safetensors")
        for name, size in ((weights.name, weights.stat().st_size - 1), (config, 0)):
            file = weights.with_name(name)
            whole = file.read_bytes()
            os.truncate(file, size)
            code, output = go(tiny, base, *last)
            assert code == 0 and "train: started" in output and "resuming after step 2 of 2" in output, output
            assert file.read_bytes() == whole, (file, size)
        assert "train: unchanged, skipped" in go(tiny, base, *last)[1]


def test_a_shard_that_is_lost_is_missed(tmp_path):
    run_dir, names = RunDir(tmp_path, "x"), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = tmp_path / "model"
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict(zip("ab", names, strict=True))})
    for name in names:
        assert not run_dir.holds_trained()
        save_file({"w": torch.zeros(3)}, folder / name)
    assert run_dir.holds_trained()
    write_json(folder / "config.json", {"of": "another program"})
    assert not run_dir.holds_trained()
    write_json(folder / "config.json", {"model_type": "llama"})
    (folder / "model.safetensors.index.json").write_text("")
    assert not run_dir.holds_trained()


def test_figures_that_were_damaged_are_told_and_begun_anew(tiny, tmp_path):
    assert go(tiny, tmp_path, "stop_after=train")[0] == 0
    file = tmp_path / "run/result.json"
    for damaged in ("", '{"steps": ', "[1]"):
        file.write_text(damaged)
        code, output = go(tiny, tmp_path, "stop_after=train")
        assert code == 0 and f"warning: {file} could not be read and begins anew" in output, output
        assert set(json.loads(file.read_text())["wall_seconds"]) == {"plan", "train"}
        assert "warning" not in go(tiny, tmp_path, "stop_after=train")[1]


def test_a_folder_with_other_things_is_not_run_over(tiny, tmp_path, capsys):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "thesis.txt").write_text("precious")
    code = run(
        compose([f"model.path={tiny}", f"run_dir={tmp_path / 'run'}", *SCALED_DOWN]), Console(file=io.StringIO())
    )
    assert code == 2 and (tmp_path / "run" / "adapter" / "thesis.txt").read_text() == "precious"


def test_a_run_whose_record_was_damaged_goes_on_from_its_checkpoint_and_no_other_job_does(tiny, tmp_path, capsys):
    assert go(tiny, tmp_path, "stop_after=train", "max_steps=1")[0] == 0
    record = tmp_path / "run/stages.json"
    record.write_text("{")
    code, output = go(tiny, tmp_path, "stop_after=train", "max_steps=1")
    assert code == 0 and f"{record} is damaged: all stages run again" in output and "train: done" in output
    assert json.loads(record.read_text())["stages"].keys() == {"plan", "train"}
    record.write_text("{")
    assert go(tiny, tmp_path, "stop_after=train", "max_steps=1", "optimizer.lr=0.5")[0] == 2
    assert "holds a run whose stages.json is damaged" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "run/config.yaml").write_text("method: [")  # nor where nothing says whose it is
    assert go(tiny, tmp_path, "stop_after=train", "max_steps=1")[0] == 2
    assert record.read_text() == "{"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("file", "file: it is not a folder"),
        ("file/a/b", "file is not a folder"),
        ("gone", "gone: it is not a folder"),  # a link to a place that is not there
        ("x" * 300, "file name too long"),
        ("/proc/run", "no such file or directory"),
        ("closed", "closed: permission denied"),
        ("auto", "permission denied"),
    ],
)
def test_a_run_dir_that_no_run_can_be_in_is_refused_as_what_was_set(given, why, tiny, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    words = [f"model.path={tiny}", "stop_after=plan", "hardware=cpu", f"run_dir={given}"]
    folder = tmp_path / "closed" if given == "auto" else tmp_path
    done = subprocess.run(
        [*PLAIN, *command(*words)], cwd=folder, capture_output=True, text=True, env=environment(), check=False
    )
    said = " ".join(done.stderr.split())
    assert (done.returncode, said.count("1 problem in the configuration; nothing was started")) == (2, 1), done.stderr
    assert why in said and " on the command line no run can be kept in " in said and "run_dir=FOLDER" in said


def test_a_refused_plan_leaves_no_folder_where_nothing_was_kept_and_says_so(tiny, tmp_path):
    wrong = [f"model.path={tiny}", "stop_after=plan", "hardware.gpu=local", "hardware.count=64"]
    for words in ([], ["run_dir=mine/run"]):
        done = finish(tmp_path, *wrong, *words)
        assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
        assert "nothing was started" in done.stderr and "hardware.count = 64" in done.stderr
    (tmp_path / "mine" / "run").mkdir(parents=True)  # somebody's own, and there it is said why
    assert finish(tmp_path, *wrong, "run_dir=mine/run").returncode == 2
    assert "64" in json.loads((tmp_path / "mine/run/result.json").read_text())["failure"]["message"]


def test_a_run_directory_of_another_job_is_refused_once_something_was_trained_there(tiny, tmp_path, capsys):
    assert go(tiny, tmp_path, "stop_after=plan")[0] == 0
    code, output = go(tiny, tmp_path, "stop_after=train", "optimizer.lr=0.001", "lora.targets=[q_proj]")
    assert code == 0 and "plan: done" in output, output
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optimizer"]["lr"] == 0.001
    assert go(tiny, tmp_path, "stop_after=plan", "optimizer.lr=0.5")[0] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "other settings or other data (lora.targets is [q_proj] there and all-linear here; optimizer.lr is" in said
    assert "is 0.001 there and 0.5 here); going on" in said
    (tmp_path / "run" / "config.yaml").write_text("seed: [")
    assert go(tiny, tmp_path, "stop_after=plan", "optimizer.lr=0.5")[0] == 2
    assert "other settings or other data; going on" in " ".join(capsys.readouterr().err.split())


def test_a_run_directory_of_this_job_with_another_chat_template_names_what_may_have_changed(tiny, tmp_path, capsys):
    (template := tmp_path / "mine.jinja").write_text("{{ messages }}")
    job = compose([f"model.path={tiny}", f"model.chat_template={template}", f"run_dir={tmp_path / 'run'}"])
    RunDir(tmp_path / "run", "another").claim()
    write_json(tmp_path / "run" / "metrics.jsonl", {})
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(job.resolved))
    assert run(job) == ConfigError.exit_code
    assert "whose files have changed since: the data, or model.chat_template" in capsys.readouterr().err


def test_a_limit_of_money_where_nobody_knows_the_price_is_refused(tiny, tmp_path, capsys):
    assert go(tiny, tmp_path, "launch.max_usd=3", "stop_after=train")[0] == 2
    said = capsys.readouterr().err
    assert "launch.max_usd" in said and "fix: launch.max_hours" in said  # no price of a CPU would be taken
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_a_run_was_killed_in_before_its_first_record_is_its_to_use(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".stages.json.123.partial").write_text("{")
    RunDir.choose(str(tmp_path / "run"), "smoke", "a", tmp_path)
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="a folder with other things in it"):
        RunDir.choose(str(tmp_path / "run"), "smoke", "a", tmp_path)


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDir(tmp_path / "run", "a").locked():
        pass


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "logs/rank-0.log"])
def test_a_run_writes_through_no_link_that_another_may_have_laid(tmp_path, name):
    """A lock that was opened anew emptied the file behind it."""
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)  # on a larger disk, say
    (tmp_path / "run" / "mine.jsonl").symlink_to(tmp_path / "precious")  # the user's own, which no run writes
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(ConfigError, match="is a symbolic link: a run would write into"),
        RunDir(tmp_path / "run", "a").locked(),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "as it was"
    (tmp_path / "run" / name).unlink()
    with RunDir(tmp_path / "run", "a").locked():
        pass


def test_what_does_not_fit_exits_3_with_a_plan(tmp_path, capsys):
    overrides = ["recipe=full_8b", "hardware=rtx4090_x1", f"run_dir={tmp_path / 'run'}"]
    assert run(compose(overrides), Console(file=io.StringIO())) == 3
    plan = Plan.read(tmp_path / "run" / "plan.json")
    assert not plan.fits and plan.alternatives


def test_training_for_other_hardware_than_this_is_refused(tiny, tmp_path, capsys):
    code, output = go(tiny, tmp_path, "hardware=h100_80gb_x1", "precision=bf16", "recipe=smoke")
    said = capsys.readouterr().err
    assert code == 2 and "stop_after=plan" in said and "launch=" in said
    assert "plan: done" in output and "train: started" not in output


def test_the_newest_run_of_the_same_job_is_found_and_another_job_gets_its_own(tmp_path):
    first = RunDir.choose("auto", "smoke", "a", tmp_path)
    first.path.mkdir(parents=True)
    first.claim()
    assert RunDir.choose("auto", "smoke", "a", tmp_path).path == first.path
    assert RunDir.choose("auto", "smoke", "b", tmp_path).path != first.path


def test_what_a_launch_brought_home_is_no_run_to_go_on_in(tmp_path):
    """It says whose it is, as its run on the machine does, and its name comes after every date."""
    home = tmp_path / "smoke" / "loadmaster-smoke-1128-090000-abcd"
    home.mkdir(parents=True)
    RunDir(home, "a").claim()
    (home / "launch.json").write_text("{}")
    assert RunDir.choose("auto", "smoke", "a", tmp_path).path != home


def test_two_processes_cannot_work_in_one_run(tmp_path):
    mine = RunDir(tmp_path, "a")
    with mine.locked(), pytest.raises(LoadmasterError, match="another process"), RunDir(tmp_path, "a").locked():
        raise AssertionError("both got in")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (
            ["/a/b/train.py", "recipe=smoke", "data.path=my file.json"],
            "python train.py recipe=smoke 'data.path=my file.json'",
        ),
        (["/usr/bin/loadmaster", "plan"], "loadmaster plan"),
    ],
)
def test_the_command_is_shown_as_one_would_type_it(argv, expected):
    assert command_line(argv) == expected


def test_the_time_of_a_training_that_was_stopped_is_kept(tiny, tmp_path, monkeypatch):
    def stops(pipeline):
        raise StoppedOnRequest("stopped after step 1")

    monkeypatch.setattr(Pipeline, "train", stops)
    assert go(tiny, tmp_path)[0] == 75
    assert set(json.loads((tmp_path / "run/result.json").read_text())["wall_seconds"]) == {"plan", "train"}
    assert not RunDir(tmp_path / "run", "").trained


@pytest.mark.parametrize("error", [LoadmasterError("step-4 could not be written"), StoppedOnRequest("stopped")])
def test_a_disk_that_is_full_hides_neither_what_was_lost_nor_that_it_was_a_stop(error):
    """What is written last, result.json, fails too."""
    pipeline = MagicMock()
    pipeline.job.stop_after = "train"
    pipeline.run_dir.is_done.return_value = False
    pipeline.composed.located.return_value.__exit__.return_value = False
    pipeline.train.side_effect = error
    pipeline._sum_up = lambda **figures: Pipeline._sum_up(pipeline, **figures)
    pipeline.run_dir.update_result.side_effect = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(type(error), match=str(error)):
        Pipeline._stage(pipeline, "train", "inputs")
