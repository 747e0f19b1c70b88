"""The code that travels with a job is this code: a wheel that pip installs, the same bytes each time, checked there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest

import loadmaster
from loadmaster.config.compose import compose
from loadmaster.config.schema import LaunchConfig
from loadmaster.launch import check, order, wheel
from loadmaster.launch import job as job_module
from tests.launch.place import Place

ROOT = Path(__file__).resolve().parents[2]


def test_what_a_user_keeps_in_the_shipped_folders_stays_here(tmp_path):
    folder = tmp_path / "conf"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (folder / "train.yaml").write_text("shipped")
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    (folder / ".env").write_text("HF_TOKEN=planted")
    (folder / "customers.jsonl").write_text("planted")
    prefix = "loadmaster/_shipped/conf"
    files = wheel._below(folder, prefix)
    assert set(files) == {f"{prefix}/{name}" for name in ("train.yaml", ".env", "customers.jsonl")}
    assert set(wheel._ours(folder, files)) == {f"{prefix}/train.yaml"}
    (tmp_path / ".git").rename(tmp_path / "elsewhere")  # no checkout: an installed copy
    assert set(wheel._ours(folder, files)) == {f"{prefix}/train.yaml", f"{prefix}/customers.jsonl"}


def test_it_holds_the_package_and_the_shipped_folders_and_nothing_of_this_machine():
    packed = wheel.own()
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        names = set(archive.namelist())
        assert archive.read("loadmaster/cli.py") == (ROOT / "loadmaster/cli.py").read_bytes()
        assert archive.read("loadmaster/_shipped/launch/torchrun.py") == (ROOT / "launch/torchrun.py").read_bytes()
        metadata = archive.read(f"loadmaster-{loadmaster.__version__}.dist-info/METADATA").decode()
    for folder in ("conf", "recipes", "data", "launch"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                assert f"loadmaster/_shipped/{path.relative_to(ROOT).as_posix()}" in names
    assert not any("__pycache__" in name for name in names)
    assert "Requires-Dist: torch>=" in metadata and "moto" not in metadata
    assert str(ROOT) not in metadata
    again = wheel.own.__wrapped__()
    assert again.sha256 == packed.sha256


def test_pip_installs_it_and_it_composes_from_there(tmp_path):
    packed = wheel.own()
    (tmp_path / packed.name).write_bytes(packed.content)
    target = tmp_path / "there"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(tmp_path / packed.name)], check=True)
    code = "from loadmaster.config.compose import compose; print(compose(['recipe=qlora_8b']).job.method)"
    env = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "qlora", done.stderr


@pytest.mark.parametrize(
    ("package", "image", "travels"),
    [
        ("auto", None, True),
        ("auto", "me/image:1", False),
        (None, "me/image:1", False),
        ("loadmaster==0.1.0", None, False),
    ],
)
def test_it_travels_where_neither_pip_nor_the_image_has_the_code(package, image, travels):
    launch = LaunchConfig(package=package, **({"image": image} if image else {}))
    assert (wheel.travelling(launch) is not None) == travels


def test_a_wheel_that_lies_here_travels_and_another_one_is_refused(tmp_path):
    path = tmp_path / wheel.own().name
    path.write_bytes(b"a wheel")
    assert wheel.travelling(LaunchConfig(package=str(path))).content == b"a wheel"

    def keys(package: str) -> list[str]:
        composed = compose(["recipe=qlora_8b", "launch=runpod", f"launch.package={package}"])
        return [problem.message for problem in check.problems(composed)]

    assert keys(str(path)) == []
    assert keys(str(tmp_path / "loadmaster-0.1.0-none.whl")) == ["there is no such file"]
    other = tmp_path / "loadmaster-9.9.9-py3-none-any.whl"
    other.write_bytes(b"x")
    (said,) = keys(str(other))
    assert said.startswith("is no wheel of loadmaster")


def without_its_requirements(place: Place, monkeypatch, change: dict[str, str] | None = None) -> None:
    """The real bootstrap and the real pip, into a folder of its own, without a package index."""
    target = place.folder / "installed"
    place.runner.environment = {
        "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_UPGRADE": "1", "PYTHONPATH": str(target),
    }
    made = order.make_order  # as it is, and not the fixture's, which takes the package away

    def with_requirements(*arguments):
        ordered = replace(made(*arguments))
        return replace(ordered, env={**ordered.env, **(change or {})})

    monkeypatch.setattr(job_module, "make_order", with_requirements)


def test_a_job_runs_on_the_code_that_came_along(place, monkeypatch):
    without_its_requirements(place, monkeypatch)
    where = ["python3", "-c", "import loadmaster; print('from', loadmaster.__file__)"]
    monkeypatch.setattr(order, "command", lambda *arguments: where)
    assert place.launch("launch.package=auto") == 0, place.said
    (body,) = [body for body in place.fake.bodies if "args" in body]
    parts = [name for name in body["env"] if name.startswith("LOADMASTER_WHEEL_")]
    job = json.loads(body["env"]["LOADMASTER_JOB"])
    assert len(parts) == job["wheel"]["parts"] >= 2 and job["package"] is None
    assert all(len(value) < 128 << 10 for value in body["env"].values())
    assert job["constraints"] == job["folder"] + "/constraints.txt"
    (pins,) = (place.folder / "workspace").rglob("constraints.txt")
    assert pins.read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert f"| from {place.folder}/installed/loadmaster/__init__.py" in place.said


def test_the_default_images_own_packages_are_not_found_beside_those_that_came_along(place, monkeypatch):
    """Its torchvision is for its own PyTorch: beside another, `import transformers` fails."""
    without_its_requirements(place, monkeypatch)
    place.runner.environment |= {"PIP_TARGET": "", "PYTHONPATH": "", "TMPDIR": str(place.folder)}
    code = "import loadmaster, sys; print('from', loadmaster.__file__); import torch"
    monkeypatch.setattr(order, "command", lambda *arguments: ["python3", "-c", code])
    assert place.launch("launch.package=auto") == 1, place.said
    made = place.folder / "loadmaster-environment-0"
    assert f"| from {made}/lib/" in place.said and "No module named 'torch'" in place.said


@pytest.mark.parametrize(
    ("image", "is_one"),
    [
        (LaunchConfig().image, True), ("runpod/pytorch", True), ("runpod/pytorch:another-tag", True),
        ("runpod/pytorch@sha256:1234", True), ("me/pytorch:1", False), ("localhost:5000/me/image", False),
    ],
)
def test_another_version_of_the_default_image_is_one_too(image, is_one):
    """Its packages are left alone as the default one's are, and it has no loadmaster."""
    assert wheel.of_the_default_kind(image) == is_one
    assert (wheel.travelling(LaunchConfig(image=image)) is not None) == is_one


def test_an_image_that_has_other_code_under_this_version_gets_the_code_that_came_along(place, monkeypatch):
    """A real environment with a loadmaster of its own, into which the real pip of the tests' Python installs."""
    without_its_requirements(place, monkeypatch)
    image, tools = place.folder / "image", place.folder / "tools"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(image)], check=True)
    (packages,) = image.glob("lib/*/site-packages")
    name, version = f"loadmaster-{loadmaster.__version__}.dist-info", loadmaster.__version__
    for path, text in {
        "loadmaster/__init__.py": f"__version__ = {version!r}\n",
        "loadmaster/of_before.py": "",
        f"{name}/METADATA": f"Metadata-Version: 2.1\nName: loadmaster\nVersion: {version}\n",
        f"{name}/RECORD": "".join(f"loadmaster/{file}.py,,\n" for file in ("__init__", "of_before")),
    }.items():
        (packages / path).parent.mkdir(exist_ok=True)
        (packages / path).write_text(text)
    tools.mkdir()
    # Not by its import, after which this process would have the standard library's distutils, and setuptools none.
    (tools / "pip").symlink_to(distribution("pip").locate_file("pip"))
    place.runner.environment |= {
        "PIP_TARGET": "", "PYTHONPATH": str(tools), "PATH": os.pathsep.join([str(image / "bin"), os.environ["PATH"]]),
    }
    where = ["python3", "-c", "import loadmaster; print('from', loadmaster.__file__)"]
    monkeypatch.setattr(order, "command", lambda *arguments: where)
    assert place.launch("launch.image=me/image:1", f"launch.package={saved(place.folder)}") == 0, place.said
    assert f"| from {packages}/loadmaster/__init__.py" in place.said
    assert (packages / "loadmaster/cli.py").read_bytes() == (ROOT / "loadmaster/cli.py").read_bytes()
    assert not (packages / "loadmaster/of_before.py").exists()


def saved(folder: Path) -> Path:
    path = folder / wheel.own().name
    path.write_bytes(wheel.own().content)
    return path


def test_a_wheel_that_is_damaged_on_its_way_is_not_installed(place, monkeypatch):
    import base64
    import lzma

    bad = base64.b64encode(lzma.compress(b"something else")).decode()
    parts = {name: "" for name in wheel.own().variables(order.PAYLOAD_BYTES)}
    without_its_requirements(place, monkeypatch, parts | {"LOADMASTER_WHEEL_0": bad})
    assert place.launch("launch.package=auto") == 4
    assert "the wheel that came along is damaged" in place.said and place.fake.pods == {}
