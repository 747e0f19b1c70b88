"""The code that runs here, as a wheel that travels with the job: what is not published can still be pinned.

A wheel is a zip with a list of its files (PyPA, binary distribution format). It is packed from the package as it lies
here, in a checkout or installed, with conf/, recipes/, data/ and launch/ where setup.py puts them. Nothing of time or
place is in it, so the same code gives the same bytes and the same SHA-256. It travels xz-compressed, in as many
environment variables as it takes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import lzma
import shutil
import subprocess
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import loadmaster
from loadmaster.config.schema import LaunchConfig
from loadmaster.config.shipped import local_path, shipped_folder
from loadmaster.errors import LoadmasterError
from loadmaster.files import FINDER_FILE

SHIPPED = ("conf", "recipes", "data", "launch")
VARIABLE = "LOADMASTER_WHEEL_"


@dataclass(frozen=True)
class Wheel:
    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def variables(self, most_bytes: int) -> dict[str, str]:
        """LOADMASTER_WHEEL_0, _1, ...: base64 of its xz, each at most so long."""
        text = _packed(self.content)
        parts = [text[at : at + most_bytes] for at in range(0, len(text), most_bytes)]
        return {f"{VARIABLE}{number}": part for number, part in enumerate(parts)}


def travelling(launch: LaunchConfig) -> Wheel | None:
    """What launch.package sends along: this code, a wheel that lies here, or None where pip or the image has it."""
    if launch.package == "auto":
        return own() if of_the_default_kind(launch.image) else None
    if launch.package is not None and is_file(launch.package):
        path = local_path(launch.package)
        return Wheel(path.name, path.read_bytes())
    return None


def of_the_default_kind(image: str) -> bool:
    """Whether an image is the default one, in this or another version: PyTorch and what goes with it, no loadmaster."""
    return _repository(image) == _repository(LaunchConfig().image)


def _repository(image: str) -> str:
    """Of NAME:TAG or NAME@DIGEST, where a registry's port has a colon too."""
    name = image.partition("@")[0]
    return name if ":" not in name.rpartition("/")[2] else name.rpartition(":")[0]


def constraints() -> bytes | None:
    """The exact versions that this checkout was tested with, for pip there; None: an installed package has none."""
    path = Path(loadmaster.__file__).parents[1] / "constraints.txt"
    return path.read_bytes() if path.is_file() else None


def is_file(package: str) -> bool:
    """Whether launch.package is meant as a path: a wheel without a scheme."""
    return package.endswith(".whl") and "://" not in package and " @ " not in package


@cache
def _packed(content: bytes) -> str:
    return base64.b64encode(lzma.compress(content, preset=9)).decode()


@cache
def own() -> Wheel:
    """Of the code that runs here. Raises LoadmasterError where its requirements are not known."""
    package = Path(loadmaster.__file__).parent
    files = _below(package, "loadmaster")
    for folder in SHIPPED:
        files |= _ours(shipped_folder(folder), _below(shipped_folder(folder), f"loadmaster/_shipped/{folder}"))
    info = f"loadmaster-{loadmaster.__version__}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: loadmaster\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nloadmaster = loadmaster.__main__:main\n"
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    files[f"{info}/RECORD"] = "".join(f"{line}\n" for line in [*record, f"{info}/RECORD,,"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # xz does better over the whole
        for name in sorted(files, key=lambda name: (name.startswith(info), name)):
            archive.writestr(zipfile.ZipInfo(name), files[name])
    return Wheel(f"loadmaster-{loadmaster.__version__}-py3-none-any.whl", buffer.getvalue())


def _below(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != FINDER_FILE
    }


def _ours(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what the user keeps there: what git does not track, and hidden files."""
    git = shutil.which("git")
    listing = [git, "-C", str(folder), "ls-files", "-z"]
    listed = subprocess.run(listing, capture_output=True, check=False).stdout if git else b""
    tracked = {name for name in listed.decode().split("\0") if name}
    prefix = f"loadmaster/_shipped/{folder.name}/"
    kept = {name: content for name, content in files.items() if "/." not in name}
    return {name: content for name, content in kept.items() if not tracked or name.removeprefix(prefix) in tracked}


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def _metadata() -> str:
    project = Path(loadmaster.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        needed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            needed = [line for line in requires("loadmaster") or [] if "extra ==" not in line]
        except PackageNotFoundError:
            raise LoadmasterError(
                "what this loadmaster requires is not known here, as it is not installed: name launch.package or "
                "launch.image"
            ) from None
    lines = ["Metadata-Version: 2.1", "Name: loadmaster", f"Version: {loadmaster.__version__}"]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in needed)]) + "\n"
