"""A broken model folder is named before anything is loaded."""

import json
import os
import shutil

import pytest

from loadmaster.config.compose import compose
from loadmaster.config.model_folder import broken_files
from loadmaster.config.overrides import as_recipe
from loadmaster.errors import ConfigError
from loadmaster.preflight import make_plan


@pytest.fixture
def folder(smollm2, tmp_path):
    """A copy whose large file is a link, which each test may replace."""
    target = tmp_path / "model"
    target.mkdir()
    for file in smollm2.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file)
        else:
            shutil.copy(file, target / file.name)
    return target


def test_a_whole_folder_has_nothing_broken(folder):
    assert list(broken_files(folder)) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"[" * 100_000, "config.json is no JSON"),
        ("config.json", b"{broken", "config.json is no JSON"),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("tokenizer.json", b"garbage", "tokenizer.json is no JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "tokenizer_config.json is no JSON"),
        ("model.safetensors", b"", "model.safetensors is no safetensors file"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is cut off in its header"),
        ("model.safetensors", b"\x02" + b"\x00" * 7 + b"[]", "model.safetensors is no safetensors file"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"a": "../a.safetensors", "b": "/etc/passwd"}}).encode(),
            "names files of other folders (../a.safetensors, /etc/passwd)",
        ),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}).encode(),
            "1 of the shards that model.safetensors.index.json names are not there (model-00002-of-00002.safetensors)",
        ),
    ],
)
def test_each_broken_file_is_named(folder, name, content, said):
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    found = list(broken_files(folder))
    assert len(found) == 1
    assert said in found[0]


def test_an_index_beside_whole_weights_is_not_followed(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert list(broken_files(folder)) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_said_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert list(broken_files(folder)) == [f"{name} cannot be read (is no regular file)"]


def test_weights_that_were_cut_off_are_refused_with_their_size(folder, smollm2):
    whole = (smollm2 / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(whole[:100_000_000])
    with pytest.raises(ConfigError) as error:
        compose([f"model.path={folder}"])
    assert f"has 100,000,000 bytes and should have {len(whole):,}" in str(error.value)


def test_weights_that_cannot_be_read_are_told_from_broken_ones(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    weights.symlink_to(folder / "elsewhere")
    assert list(broken_files(folder)) == [f"{weights.name} cannot be read (no such file or directory)"]


def test_a_folder_with_only_a_configuration_can_be_planned(folder):
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert compose([f"model.path={folder}"]).job.model.path == str(folder)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["*token*", "vocab*"], "model.path holds no tokenizer: enough for a plan, not to train"),
        (["*token*", "vocab*", "*.safetensors"], "model.path holds no weights (*.safetensors) and no tokenizer: en"),
        ([], None),
    ],
)
def test_a_plan_says_what_a_folder_lacks_for_training(folder, gone, said):
    for file in (file for name in gone for file in folder.glob(name)):
        file.unlink()
    told = [reason for reason in make_plan(compose([f"model.path={folder}", "hardware=h100_80gb_x1"]).job).reasons
            if reason.startswith("model.path holds no")]
    assert len(told) == bool(said) and (not said or told[0].startswith(said))


@pytest.mark.parametrize(
    ("given", "what"),
    [("run", "a run"), ("run/adapter", "the adapter of a run"), ("run/export/adapter", "an export of a run"),
     ("run/export/gguf", "an export of a run")],
)
def test_a_second_stage_over_a_run_is_told_what_to_train_on(tmp_path, given, what):
    for name in ("adapter", "export/adapter", "export/gguf"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("stages.json", "plan.json", "adapter/adapter_config.json", "export/adapter/adapter_config.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ConfigError) as refused:
        compose([f"model.path={tmp_path / given}"])
    (problem,) = refused.value.problems
    assert problem.message == f"is {what}, not a model"
    assert problem.remedy.startswith(f"model.path={tmp_path}/run/export/bf16, what that run trained")


def test_a_run_given_as_a_word_is_told_how_to_go_on_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("stages.json", "plan.json"):
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "run/export/gguf").mkdir(parents=True)
    for word in ("run", "run/config.yaml", "run/export/gguf"):
        with pytest.raises(ConfigError) as refused:
            compose([word])
        assert refused.value.problems[0].remedy.startswith("loadmaster train run goes on")


def test_a_file_of_fields_is_not_taken_for_the_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine/smoke.yaml", "recipes/team/own.yaml", "recipes/qlora_8b.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("seed: 1\n")
    assert as_recipe("mine/smoke.yaml") == "put it into recipes/ here as my_smoke.yaml, then recipe=my_smoke"
    assert as_recipe("recipes/team/own.yaml") == "recipe=team/own"
    assert as_recipe("recipes/qlora_8b.yaml") == "recipe=qlora_8b"
    assert as_recipe("nowhere/smoke.yaml") == "recipe=smoke"
