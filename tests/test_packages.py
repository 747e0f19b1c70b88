"""What a job needs of packages that a machine may lack is said in words, before a model is loaded where it can be."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from loadmaster import packages, pipeline
from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError, LoadmasterError


def plan(**fields):
    usual = {"method": "lora", "precision": "bf16", "optimizer": "adamw", "master_weights": True, "sharding": "none"}
    return SimpleNamespace(**{**usual, **fields})


@pytest.mark.parametrize(
    ("fields", "formats", "wanted"),
    [({}, ["adapter", "bf16", "fp8"], set()),
     ({"method": "qlora"}, [], {"bitsandbytes"}),
     ({"method": "full", "optimizer": "paged_adamw_8bit"}, [], {"bitsandbytes"}),
     ({"method": "full", "master_weights": False}, [], {"bitsandbytes"}),
     ({"method": "full", "master_weights": False, "precision": "fp32"}, [], set()),
     ({"method": "full", "master_weights": False, "sharding": "zero2"}, [], set()),
     ({"method": "full", "precision": "fp8"}, [], {"torchao"}),
     ({"precision": "fp8"}, ["int4", "gguf"], {"llmcompressor", "gguf"})],
)
def test_a_job_is_refused_for_the_packages_that_it_needs_and_no_others(monkeypatch, fields, formats, wanted):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert {package for package, *_ in packages.needed(plan(**fields), formats)} == wanted
    if not wanted:
        return packages.refuse_missing(plan(**fields), formats)
    with pytest.raises(ConfigError) as raised:
        packages.refuse_missing(plan(**fields), formats)
    assert all(f"pip install {package}" in str(raised.value) for package in wanted)
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    packages.refuse_missing(plan(**fields), formats)


@pytest.mark.parametrize("missed", [ModuleNotFoundError("", name="gguf"), PackageNotFoundError("gguf")])
def test_a_package_that_is_missed_on_the_way_is_no_traceback(monkeypatch, tmp_path, capsys, missed):
    def fail(*_, **__):
        raise missed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "make_plan", fail)
    assert pipeline.run(compose(["recipe=smoke", "stop_after=plan"])) == LoadmasterError.exit_code
    assert "pip install gguf" in capsys.readouterr().err


def test_a_module_of_our_own_that_is_missing_is_a_defect():
    assert packages.explained(ModuleNotFoundError("", name="loadmaster.gone")) is None
    assert packages.explained(ModuleNotFoundError("", name="torch.gone")) is None
    assert packages.explained(ModuleNotFoundError("")) is None
