"""conf/, recipes/ and data/ are found in a checkout and in a wheel, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from loadmaster.config.shipped import display_path, resolve_path, shipped_folder, shipped_path

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("conf", "recipes", "data", "launch")


def test_shipped_data_has_the_same_short_name_everywhere_and_other_paths_are_left_alone():
    assert resolve_path("shipped:tickets/train.jsonl") == str(shipped_path("tickets/train.jsonl"))
    assert Path(resolve_path("shipped:tickets/train.jsonl")).is_file()
    assert resolve_path("tickets/train.jsonl") == "tickets/train.jsonl"
    assert resolve_path("owner/dataset") == "owner/dataset"


def test_paths_are_shown_as_one_would_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "recipes" / "a.yaml") == "recipes/a.yaml"
    assert display_path(shipped_folder("conf")) == str(shipped_folder("conf"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this working tree, built from a copy so that no build folder is left in it."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("loadmaster", *SHIPPED):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=skip)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / file).exists():
            shutil.copy(REPOSITORY / file, source / file)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True, text=True)
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package_and_of_the_shipped_folders(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("loadmaster", "loadmaster"), *((name, f"loadmaster/_shipped/{name}") for name in SHIPPED)):
        root = REPOSITORY / folder
        expected = {
            f"{inside}/{path.relative_to(root)}"
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
            if folder == "loadmaster" or path.suffix != ".py"
        }
        assert expected
        assert expected <= held, sorted(expected - held)


def test_the_installed_wheel_composes_from_any_folder_and_finds_recipes_there(wheel: Path, tmp_path: Path):
    installed, here = tmp_path / "installed", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(installed)
    (here / "recipes").mkdir(parents=True)
    (here / "recipes" / "mine.yaml").write_text("lora:\n  rank: 5\n")
    script = (
        "import json, sys; from loadmaster.config.compose import compose; "
        "from loadmaster.config.shipped import resolve_path; "
        "a, b = compose([]), compose(['recipe=mine']); "
        "print(json.dumps([a.job.recipe, resolve_path(a.job.data.path), b.job.lora.rank, b.origins['lora.rank']]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True, check=True
    )
    recipe, data, rank, origin = json.loads(done.stdout)
    assert (recipe, rank, origin) == ("smoke", 5, "recipes/mine.yaml:2")
    assert Path(data) == installed / "loadmaster/_shipped/data/tickets/train.jsonl"
    assert Path(data).is_file()
