"""A network volume through the provider's S3 API: files go up in parts and come home, nothing twice, all compared.

    name of a file on the volume    s3://VOLUME/runs/x/...   = /workspace/runs/x/... on a Pod
                                                             = /runpod-volume/runs/x/... on a serverless worker

An upload that was cut off goes on with the first part that is missing. Each part carries its MD5, which the service
checks, and the service's own MD5 (the ETag) is compared with ours for each part and for the whole file. Where its
ETag cannot be compared (a file that another tool sent in parts of another size) the file is read back and hashed.
A file that comes home goes on where it was cut off, and counts once its SHA-256 is that of its manifest.
Keys come from the environment and go into signatures only.
"""

from __future__ import annotations

import hashlib
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadmaster import catalog
from loadmaster.errors import LoadmasterError, ProviderError
from loadmaster.files import PARTIAL_SUFFIX, sha256_file
from loadmaster.launch.given import wrong_address, wrong_key

KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""As the provider's documentation has it: they hold its S3 API key, not one of Amazon's."""
URL_VARIABLE = "RUNPOD_S3_URL"
"""Another address than the catalogue's."""
PART_BYTES = 64 * 2**20
MOST_PARTS = 10_000
ATTEMPTS = 10
"""The provider's advice against its 502s."""
READ_TIMEOUT_S = 120
COMPLETE_TIMEOUT_S = 7200
"""Its advice for joining the parts of large files."""
MULTIPART_ETAG = re.compile(r"[0-9a-f]{32}-\d+")

Progress = Callable[[int], None]
"""Called with bytes that are safe on the volume, as they get there."""


class Damaged(ProviderError):
    """What is on the volume is not what was sent."""


@dataclass(frozen=True)
class Entry:
    """A file on the volume, as its folder lists it."""

    bytes: int
    modified: datetime


def url_of(data_center: str) -> str:
    """Address of the S3 API for volumes of this data center. Raises LoadmasterError where there is none."""
    facts = catalog.serving()["s3"]
    if url := os.environ.get(URL_VARIABLE, "").strip():
        if wrong := wrong_address(URL_VARIABLE, url, "https://HOST/", "read and change what is sent"):
            raise LoadmasterError(wrong)
        return url
    if data_center not in facts["data_centers"]:
        raise LoadmasterError(
            f"volumes in {data_center} have no S3 API, so their files cannot be reached from here (there is one in "
            f"{', '.join(facts['data_centers'])}): copy them on a Pod that mounts the volume; deploy --no-upload goes "
            "on without"
        )
    return facts["url"].format(data_center=data_center.lower())


def reachable(data_center: str) -> bool:
    """Whether files of volumes there can be reached from here."""
    return bool(os.environ.get(URL_VARIABLE, "").strip()) or data_center in catalog.serving()["s3"]["data_centers"]


class Bucket(AbstractContextManager):
    """One volume. Raises ProviderError (no message has a key) for everything that the service refuses."""

    def __init__(
        self, volume: str, data_center: str, part_bytes: int = PART_BYTES, attempts: int = ATTEMPTS,
        read_timeout_s: float = READ_TIMEOUT_S,
    ):
        self.volume, self.part_bytes, self.attempts = volume, part_bytes, attempts
        self._etags: dict[Path, set[str]] = {}
        self._secrets = require_keys()
        with self._said("the connection"):
            self._client = _clients(url_of(data_center), data_center, self._secrets, attempts)
            self._s3 = self._client(read_timeout_s)

    def __exit__(self, *error: object) -> None:
        self._s3.close()

    @cached_property
    def _patient(self) -> Any:
        """For what the service takes its time over."""
        return self._client(COMPLETE_TIMEOUT_S)

    def put(self, path: Path, name: str, sha256: str, progress: Progress = lambda sent: None) -> int:
        """Bring `path` to `name`; returns the bytes that had to be sent. sha256: of the file, as its manifest has it.

        What is there already and equal is left alone. Raises Damaged when the volume has something else afterwards.
        """
        size = path.stat().st_size
        step = self._step(size)
        if self.holds(path, name, sha256):
            progress(size)
            return 0
        sent = self._put_whole(path, name, progress) if size <= step else self._put_parts(path, name, step, progress)
        if not self.holds(path, name, sha256):
            raise Damaged(f"{name} on volume {self.volume} is not what was sent; start again, and it is sent anew")
        return sent

    def holds(self, path: Path, name: str, sha256: str) -> bool:
        """Whether `name` is there and is `path`, byte for byte."""
        found = self._head(name)
        size = path.stat().st_size
        if found is None or found[0] != size:
            return False
        if path not in self._etags:
            self._etags[path] = etags(path, self._step(size))
        if found[1] in self._etags[path]:
            return True
        if MULTIPART_ETAG.fullmatch(found[1]) or len(found[1]) != 32:  # it says nothing of these parts
            return self.sha256(name) == sha256
        return False

    def get(self, name: str, path: Path, file: dict[str, Any], progress: Progress = lambda fetched: None) -> int:
        """Bring `name` home to `path`; returns the bytes that were fetched. file: its entry in the manifest.

        What is here and equal is left alone, and what was cut off goes on where it was. Raises Damaged when what
        came is something else.
        """
        if path.is_file() and path.stat().st_size == file["bytes"] and sha256_file(path) == file["sha256"]:
            progress(file["bytes"])
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        for _ in range(2):  # once more from the beginning: what lay here was of another file, or came damaged
            before = partial.stat().st_size if partial.is_file() else 0
            self._fetch(name, partial, file["bytes"], progress)
            if partial.stat().st_size == file["bytes"] and sha256_file(partial) == file["sha256"]:
                os.replace(partial, path)
                return file["bytes"] - before
            partial.unlink()
        raise Damaged(f"{name} on volume {self.volume} is not what its manifest says (sha256 or size differs)")

    def bring(self, name: str, path: Path, size: int) -> None:
        """Bring a small file home whose hash nobody knows. Raises Damaged where it does not come whole."""
        from botocore.exceptions import BotoCoreError

        with self._said(f"read {name}"):
            for left in reversed(range(self.attempts)):
                try:
                    data = self._s3.get_object(Bucket=self.volume, Key=name)["Body"].read()
                except BotoCoreError:
                    if not left:
                        raise
                    continue
                if len(data) == size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                    return
        raise Damaged(f"{name} on volume {self.volume} does not come whole; start again")

    def entries(self, folder: str) -> dict[str, Entry]:
        """All files below `folder`, by name."""
        found: dict[str, Entry] = {}
        with self._said(f"list {folder}"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.volume, Prefix=f"{folder}/")
            for page in pages:
                for entry in page.get("Contents", []):
                    if not entry["Key"].endswith("/"):
                        found[entry["Key"]] = Entry(entry["Size"], entry["LastModified"])
        return found

    def sha256(self, name: str) -> str:
        """Read the file back, all of it."""
        digest = hashlib.sha256()
        with self._said(f"read {name} back"):
            for piece in self._patient.get_object(Bucket=self.volume, Key=name)["Body"].iter_chunks(2**20):
                digest.update(piece)
        return digest.hexdigest()

    # ------------------------------------------------------------------ inside

    def _step(self, size: int) -> int:
        """Bytes of a part: larger ones for a file that would have too many."""
        return max(self.part_bytes, -(-size // MOST_PARTS))

    def _head(self, name: str) -> tuple[int, str] | None:
        """(bytes, ETag) of what is there."""
        from botocore.exceptions import ClientError

        with self._said(f"look at {name}"):
            try:
                found = self._s3.head_object(Bucket=self.volume, Key=name)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
            return found["ContentLength"], found["ETag"].strip('"')

    def _put_whole(self, path: Path, name: str, progress: Progress) -> int:
        data = path.read_bytes()
        with self._said(f"send {name}"):
            self._s3.put_object(Bucket=self.volume, Key=name, Body=data, ContentMD5=_md5_header(data))
        progress(len(data))
        return len(data)

    def _put_parts(self, path: Path, name: str, step: int, progress: Progress) -> int:
        upload, there = self._begun(name)
        parts, sent = [], 0
        for number, data in enumerate(_pieces(path, step), 1):
            etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if there.get(number) != (len(data), etag):
                with self._said(f"send part {number} of {name}"):
                    answer = self._s3.upload_part(
                        Bucket=self.volume, Key=name, UploadId=upload, PartNumber=number, Body=data,
                        ContentMD5=_md5_header(data),
                    )
                if answer["ETag"].strip('"') != etag:
                    raise Damaged(f"part {number} of {name} arrived damaged at volume {self.volume}; start again")
                sent += len(data)
            parts.append({"PartNumber": number, "ETag": f'"{etag}"'})
            progress(len(data))
        with self._said(f"join the parts of {name}"):
            self._join(name, upload, parts, path.stat().st_size)
            for other in self._uploads(name):  # begun twice, where an answer was lost
                self._s3.abort_multipart_upload(Bucket=self.volume, Key=name, UploadId=other)
        return sent

    def _join(self, name: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        """Join; an answer that was lost after it was done shows as an upload that is unknown."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._patient.complete_multipart_upload(
                Bucket=self.volume, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except (ClientError, BotoCoreError):
            found = self._head(name)
            if found is None or found[0] != size:
                raise

    def _begun(self, name: str) -> tuple[str, dict[int, tuple[int, str]]]:
        """(id of the upload of `name` that was begun last, its parts by number), or a new one."""
        with self._said(f"begin {name}"):
            begun = self._uploads(name)
            if not begun:
                return self._s3.create_multipart_upload(Bucket=self.volume, Key=name)["UploadId"], {}
            upload, parts = begun[-1], {}
            for page in self._s3.get_paginator("list_parts").paginate(Bucket=self.volume, Key=name, UploadId=upload):
                for part in page.get("Parts", []):
                    parts[part["PartNumber"]] = (part["Size"], part["ETag"].strip('"'))
            return upload, parts

    def _uploads(self, name: str) -> list[str]:
        """Uploads of `name` that are begun and not joined, oldest first."""
        begun = self._s3.list_multipart_uploads(Bucket=self.volume, Prefix=name).get("Uploads", [])
        begun = [upload for upload in begun if upload["Key"] == name]
        return [u["UploadId"] for u in sorted(begun, key=lambda upload: str(upload.get("Initiated", "")))]

    def _fetch(self, name: str, partial: Path, size: int, progress: Progress) -> None:
        """Append to `partial` what it lacks of `size` bytes; a broken stream goes on, as long as something comes."""
        from botocore.exceptions import BotoCoreError

        without = 0
        with self._said(f"fetch {name}"), open(partial, "ab") as file:
            progress(file.tell())
            while (have := file.tell()) < size:
                try:
                    found = self._s3.get_object(Bucket=self.volume, Key=name, Range=f"bytes={have}-")
                    if have and "ContentRange" not in found:  # all of it came again
                        file.truncate(0)
                    for piece in found["Body"].iter_chunks(2**20):
                        file.write(piece)
                        progress(len(piece))
                except BotoCoreError:
                    if without + 1 >= self.attempts:
                        raise
                without = 0 if file.tell() > have else without + 1
                if without >= self.attempts:
                    return

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            text = str(error)
            for secret in self._secrets:
                text = text.replace(secret, "[key]")
            raise ProviderError(
                f"volume {self.volume}, {what}: {text[:400]}; start again, and it goes on where it was"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError):  # redirects in circles are botocore's recursion
            raise ProviderError(
                f"volume {self.volume}, {what}: the answer is none of an S3 API; does {URL_VARIABLE} name another "
                "server, or does one in between answer?"
            ) from None


def etags(path: Path, step: int) -> set[str]:
    """What an S3 service may call the ETag of this file: its MD5, or the MD5 of its parts' MD5s, and their number."""
    whole, of_parts, count = hashlib.md5(usedforsecurity=False), hashlib.md5(usedforsecurity=False), 0
    for piece in _pieces(path, step):
        whole.update(piece)
        of_parts.update(hashlib.md5(piece, usedforsecurity=False).digest())
        count += 1
    return {whole.hexdigest(), f"{of_parts.hexdigest()}-{count}"}


def file_facts(path: Path) -> dict[str, Any]:
    """An entry as a manifest has it, for a file that no manifest lists (the manifest itself)."""
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _pieces(path: Path, step: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(step):
            yield data


def _md5_header(data: bytes) -> str:
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def has_keys() -> bool:
    """Whether the environment holds an S3 API key."""
    return all(os.environ.get(name, "").strip() for name in KEY_VARIABLES)


def require_keys() -> tuple[str, str]:
    """The S3 API key of the environment, and something that can use it. Raises LoadmasterError where there is none."""
    found = tuple(os.environ.get(name, "").strip() for name in KEY_VARIABLES)
    for name, value in zip(KEY_VARIABLES, found, strict=True):
        if value and (wrong := wrong_key(name, value, "S3 API Keys")):
            raise LoadmasterError(wrong)
    if not all(found):
        raise LoadmasterError(
            f"{' and '.join(KEY_VARIABLES)} are not set: they hold the provider's S3 API key (console: Settings, S3 "
            "API Keys), with which files go to a network volume and come from it. Keys are read from nowhere else. "
            "deploy --no-upload goes on without, where the files are on the volume already"
        )
    if find_spec("botocore") is None:
        raise LoadmasterError(
            'files of a network volume need botocore: pip install "loadmaster[upload]"; deploy --no-upload goes on '
            "without, where the files are on the volume already"
        )
    return found[0], found[1]


def _clients(url: str, region: str, keys: tuple[str, str], attempts: int) -> Callable[[float], Any]:
    from botocore.config import Config
    from botocore.session import Session

    # Profiles and files are Amazon's: only this call says where to, and as whom.
    unset = {name: (None, None, None, None) for name in ("profile", "region")}
    files = {name: (None, None, os.devnull, None) for name in ("config_file", "credentials_file")}
    session = Session(session_vars={**unset, **files})

    def make(read_timeout_s: float) -> Any:
        config = Config(
            signature_version="s3v4", connect_timeout=30, read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": attempts}, s3={"addressing_style": "path"},
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
        )
        return session.create_client(
            "s3", region_name=region, endpoint_url=url, aws_access_key_id=keys[0], aws_secret_access_key=keys[1],
            config=config,
        )

    return make
