"""The plan-serving command: words, table, JSON, exit codes."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from loadmaster.cli import main
from loadmaster.config.schema import ModelConfig
from loadmaster.config.shipped import shipped_folder
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.serving import plan_serving
from loadmaster.preflight.serving_command import plan_serving_command
from loadmaster.preflight.serving_model import named

LLAMA = "model=meta-llama/Llama-3.1-70B"


def test_a_table_says_what_fits_and_what_best_of_n_does(capsys) -> None:
    assert plan_serving_command([LLAMA, "format=int4", "gpu=l40s", "context=2048"]) == 0
    said = capsys.readouterr().out
    assert "fits" in said and "weights" in said and "best of 8" in said and "39.50 GB" in said


def test_what_best_of_8_would_do_is_the_same_whatever_was_asked_for(capsys) -> None:
    def rows(best_of_n: int) -> dict[str, str]:
        words = [LLAMA, "format=int4", "gpu=h200", "context=2048", f"best_of_n={best_of_n}"]
        plan_serving_command(words)
        table = capsys.readouterr().out.partition("\ntraffic ")[2].splitlines()
        assert table[0].split("  ")[-1] == "$ a million tokens" and "cache tokens  requests at once" in table[0]
        cells = [re.split(r"  +", line)[:3] for line in table[1:]]
        return {traffic: held for traffic, _, held in cells}

    asked = rows(8)
    assert rows(1)["best of 8"] == rows(4)["best of 8"] == asked["as asked"] and "best of 8" not in asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([LLAMA, "format=int4", "gpu=l40s", "context=2048"], "35 GB of weights, 42 GB in all"),
        (["model=smollm2_135m", "gpu=rtx4090"], "0.3 GB of weights, 0.3 GB in all; the checkpoint has 0.3 GB"),
    ],
)
def test_the_rule_of_thumb_is_no_0_gb_for_a_small_model(words, said, capsys) -> None:
    assert plan_serving_command(words) == 0
    assert f"rule of thumb: {said}" in capsys.readouterr().out


def test_what_does_not_fit_exits_with_3(capsys) -> None:
    assert plan_serving_command([LLAMA, "gpu=h100_80gb"]) == 3
    said = capsys.readouterr()
    assert "does not fit" in said.out and said.err.startswith("gpu=auto lists the machines")


def test_without_a_gpu_every_machine_that_fits_is_listed_cheapest_first(capsys) -> None:
    assert plan_serving_command([LLAMA, "format=int4", "requests=4", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert all(plan["concurrent_requests"] >= 4 for plan in plans)
    assert [p["pod_usd_per_hour"] for p in plans] == sorted(p["pod_usd_per_hour"] for p in plans)
    assert plan_serving_command([LLAMA, "requests=100000"]) == 3


def test_a_machine_has_the_same_numbers_named_as_in_the_list(capsys) -> None:
    asked = [LLAMA, "context=8192", "prompt_tokens=500", "output_tokens=300", "format=int4", "--json"]
    assert plan_serving_command(asked) == 0
    listed = {(plan["gpu"], plan["gpus"]): plan for plan in json.loads(capsys.readouterr().out)}
    for gpu, count in (("l40s", 8), ("h200", 1)):
        assert plan_serving_command([*asked, f"gpu={gpu}", f"count={count}"]) == 0
        assert json.loads(capsys.readouterr().out) == [listed[gpu, count]]


@pytest.mark.parametrize("gpu", ["auto", "l40s"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt_tokens=9000", "output_tokens=9000"], "9000 + 9000 tokens is longer than context=8192"),
        (["prompt_tokens=8192"], "8192 + 1 tokens is longer"),
        (["output_tokens=8192"], "output_tokens = 8192"),
        (["context=1"], "fix: context=2"),
    ],
)
def test_a_usual_request_that_is_longer_than_the_longest_is_refused(gpu, words, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_serving_command([LLAMA, f"gpu={gpu}", *words])


def test_one_part_of_a_usual_request_leaves_the_rest_of_the_longest_to_the_other(capsys) -> None:
    for words in (["prompt_tokens=8000"], ["output_tokens=8000"]):
        assert plan_serving_command([LLAMA, "format=int4", "gpu=h200", "context=8192", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)[0]["context"] == 8192


def test_a_named_machine_says_whether_it_holds_the_requests_and_how_many_such_machines_do(capsys) -> None:
    asked = ["model=meta-llama/Llama-3.1-8B", "gpu=l40s", "context=8192"]  # holds 23.4
    assert plan_serving_command([*asked, "requests=23"]) == 0
    assert "holds the 23 requests" in capsys.readouterr().out
    assert plan_serving_command([*asked, "requests=100"]) == 3
    said = capsys.readouterr().out
    assert "fits" in said and "does not hold the 100 requests" in said and ": 5 such machines do" in said
    assert plan_serving_command([*asked, "requests=100", "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)[0]
    assert (plan["requests"], plan["machines"], plan["fits"]) == (100, 5, True)
    assert plan_serving_command([LLAMA, "gpu=l40s", "requests=4"]) == 3
    assert "no number of such machines" in capsys.readouterr().out
    assert plan_serving_command(asked) == 0
    assert "asked for" not in capsys.readouterr().out


def test_help_lists_every_word_with_its_default(capsys) -> None:
    assert main(["plan-serving", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("model=NAME", "utilisation=0.9", "three quarters of context", "--json"))


def test_a_card_without_a_price_is_said_to_have_none(capsys) -> None:
    assert plan_serving_command(["model=Qwen/Qwen2.5-7B-Instruct", "gpu=l4"]) == 0
    assert "price: none is known of l4" in capsys.readouterr().out


def test_a_model_given_without_its_key_is_answered_with_it() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_serving_command(["Qwen/Qwen2.5-7B-Instruct", "--gpu"])
    said = str(caught.value)
    assert "fix: model=Qwen/Qwen2.5-7B-Instruct\n" in said and "model=--" not in said


def test_every_wrong_word_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_serving_command(["modl=x", "gpu=h100", "context=many", "format=int3"])
    said = str(caught.value)
    assert "fix: gpu=h100_80gb; one of" in said
    assert all(word in said for word in ("modl", "model=x", "context", "format", "model="))


@pytest.mark.parametrize(
    ("word", "must", "fix"),
    [
        ("context=8k", "an integer above 0, or auto", "context=auto is the default"),
        ("context=8192.5", "an integer above 0, or auto", "context=auto is the default"),
        ("count=two", "an integer above 0, or auto", "count=auto is the default"),
        ("utilisation=90", "a number of at least 0 and below 1", "utilisation=0.9 is the default"),
        ("requests=-1", "a number above 0", "requests=1 is the default"),
        ("format=int3", "one of auto, bf16, fp8, int4", "format=int4; format=auto is the default"),
        ("cache=[", "one of bf16, fp8", "cache=bf16 is the default"),
        ("best_of_n=", "an integer above 0", "best_of_n=1 is the default"),
    ],
)
def test_a_wrong_value_is_answered_with_what_it_must_be_and_the_default(word, must, fix) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_serving_command([LLAMA, word])
    (problem,) = caught.value.problems
    assert (problem.key, problem.message, problem.remedy) == (word.partition("=")[0], f"must be {must}", fix)


@pytest.mark.parametrize("file", sorted(shipped_folder("conf").glob("model/*.yaml")), ids=lambda file: file.stem)
def test_names_of_the_jobs_models_are_taken(file, capsys) -> None:
    assert main(["plan-serving", f"model={file.stem}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["model"] == yaml.safe_load(file.read_text())["name"]


def test_a_name_of_the_current_folders_conf_is_taken_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/llama3_1_8b.yaml").write_text("name: my/model\npath: /models/mine\npackage: x\n")
    assert named("llama3_1_8b") == ModelConfig(name="my/model", path="/models/mine")
    assert named("smollm2_135m").name == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_model_that_is_not_there_is_said_in_the_commands_own_words(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("loadmaster.preflight.config_json._from_hub", lambda model: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/export/bf16").mkdir(parents=True)
    (tmp_path / "run/export/bf16/config.json").write_text("{}")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "new", "n_routed_experts": 8}))
    for word, said in (
        (f"{tmp_path}/empty", "this folder has no config.json"),
        (f"{tmp_path}/run", f"fix: model={tmp_path}/run/export/bf16, what this run exported"),
        (f"{tmp_path}/torn", "config.json cannot be read"),
        (f"{tmp_path}/none", "there is no such folder"),
        ("./none", "there is no such folder"),
        (f"./{'long' * 99}", "there is no such folder"),
        ("llama3_1_9b", "or model=llama3_1_8b or meta-llama/Llama-3"),
        ("nobody/nothing", "no config.json found"),
        (f"{tmp_path}/other", "one of these types: llama"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan_serving_command([f"model={word}", "gpu=l40s"])
        (problem,) = caught.value.problems
        assert problem.key == "model" and said in str(problem)
        assert not any(alien in str(problem) for alien in ("model.name", "model.path", "the job", "plan.trace"))


def test_a_folder_with_a_config_is_a_model(tmp_path, capsys) -> None:
    config = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_serving_command([f"model={tmp_path}", "gpu=rtx4090", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["weights_gb"] == 0.27
    (tmp_path / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 512}))
    with pytest.raises(LoadmasterError, match="latent attention"):
        plan_serving_command([f"model={tmp_path}", "gpu=rtx4090"])


def test_a_quantized_checkpoint_counted_in_bf16_is_said_to_have_fewer_bits(tmp_path, capsys) -> None:
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 8, "quantization_config": {"quant_method": "compressed-tensors"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for words, said in ((["gpu=l40s"], True), ([], True), (["gpu=l40s", "format=int4"], False)):
        assert plan_serving_command([f"model={tmp_path}", *words]) == 0
        assert ("weights are quantized (compressed-tensors)" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    ("stored", "counted"),
    [
        ({"config_groups": {"0": {"weights": {"type": "int", "num_bits": 4}}}}, "int4"),
        ({"config_groups": {"0": {"weights": {"type": "float", "num_bits": 8}}}}, "fp8"),
        ({"config_groups": {"0": {"weights": {"type": "float", "num_bits": 4}}}}, "bf16"),
        ({"config_groups": {"0": None, "1": {"weights": [8]}}}, "bf16"),
        ({"config_groups": {"0": {"weights": {"type": ["int"], "num_bits": 4}}}}, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "awq", "bits": 8}, "bf16"),
        (None, "bf16"),
    ],
)
def test_weights_are_counted_as_they_are_stored(stored, counted, tmp_path, capsys) -> None:
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 8, "quantization_config": stored,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_serving_command([f"model={tmp_path}", "gpu=l40s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["format"] == counted


def test_a_home_folder_of_nobody_is_a_folder_that_is_not_there(capsys) -> None:
    assert main(["plan-serving", "model=~nobody-of-that-name/model"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_request_is_no_longer_by_default_than_what_the_model_knows(tmp_path, capsys) -> None:
    known = {"max_position_embeddings": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(known))
    asked = [f"model={tmp_path}", "gpu=l40s"]
    assert plan_serving_command(asked) == 0
    said = capsys.readouterr().out
    assert "requests of 2,048 tokens" in said and "a server refuses" not in said and " 0.25 KiB " in said
    assert "answers 8x as long" not in said  # nor does a what-if go beyond it
    for words in (asked, asked[:1], [*asked, "--json"]):
        with pytest.raises(ConfigError, match="longer requests than the model knows positions: 2,048") as refused:
            plan_serving_command([*words, "context=4096"])
        assert refused.value.problems[0].remedy == "context=2048"
    assert not plan_serving(from_config(known, "x"), from_catalog("l40s", 1), context=4096).fits
    for more in ([], ["context=2048"]):  # nor is more of it advised
        with pytest.raises(ConfigError, match=r"2000 . 512 tokens is longer than context=2048") as refused:
            plan_serving_command([*asked, "prompt_tokens=2000", "output_tokens=512", *more])
        assert refused.value.problems[0].remedy.startswith("a shorter one: the model knows 2,048 positions")
    with pytest.raises(ConfigError, match="fix: context=2000"):
        plan_serving_command([*asked, "prompt_tokens=1500", "output_tokens=500", "context=1024"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["count=3"], "cannot divide meta-llama/Llama-3.1-70B, of 64 attention heads, over so many cards"),
        (["count=3", "gpu=l40s"], "over so many cards"),
        (["count=16"], "no machine of the catalogue has so many cards"),
    ],
)
def test_a_number_of_cards_that_cannot_be_is_refused_with_those_that_can(words, said) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_serving_command([LLAMA, *words])
    assert said in str(raised.value) and "count=1 or 2 or 4 or 8" in str(raised.value)


def test_what_no_machine_holds_is_one_line_of_any_log(capsys) -> None:
    assert plan_serving_command([LLAMA, "requests=100000"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("no machine of the catalogue holds 100,000 requests of 8,192 tokens: try format=int4")
