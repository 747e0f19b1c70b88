"""Files onto a volume through a real S3 server: resumed, compared, sent again where they changed, never trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadmaster.errors import LoadmasterError, ProviderError
from loadmaster.export.manifest import write_manifest
from loadmaster.launch.volume import bucket as bucket_module
from loadmaster.launch.volume.bucket import Bucket, Damaged, url_of
from loadmaster.launch.volume.upload import upload
from tests.launch.fake_s3 import ACCESS, FAULTS, SECRET, FakeS3

FOLDER = "runs/tickets/one/export/bf16"
PART = 50 * 2**10


@pytest.fixture
def s3(monkeypatch) -> Iterator[FakeS3]:
    with FakeS3(["vol1"]) as s3:
        monkeypatch.setenv("RUNPOD_S3_URL", s3.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield s3
        assert s3.refused == []
        assert not any(SECRET in header for header in s3.headers)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "bf16"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (4 * 110))  # 110 KiB: three parts
    return manifested(folder)


def manifested(folder: Path) -> Path:
    write_manifest(folder, {"format": "bf16", "verification": {"passed": True}})
    return folder


def connect(attempts: int = 4, read_timeout_s: float = 1.0) -> Bucket:
    return Bucket("vol1", "EU-RO-1", PART, attempts, read_timeout_s)


def sent(artifact: Path, said: list[str] | None = None, **options) -> int:
    with connect(**options) as bucket:
        return upload(artifact, FOLDER, bucket, (said if said is not None else []).append)


@pytest.fixture(autouse=True)
def without_waits(monkeypatch) -> None:
    monkeypatch.setattr(bucket_module, "COMPLETE_TIMEOUT_S", 1.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)


def on_volume(s3: FakeS3) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in s3.objects("vol1").items()}


def expected(artifact: Path) -> dict[str, str]:
    files = {f"{FOLDER}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in artifact.iterdir()}
    assert len(files) == 3
    return files


def test_every_file_arrives_and_a_second_time_nothing_is_sent(s3, artifact) -> None:
    said: list[str] = []
    total = sum(path.stat().st_size for path in artifact.iterdir())
    assert sent(artifact, said) == total
    assert on_volume(s3) == expected(artifact) and s3.begun("vol1") == 0
    assert sum(call.startswith("UploadPart") for call in s3.calls) == 3
    writes = [call for call in s3.calls if call.startswith(("Put", "Complete"))]
    assert writes[-1].endswith("manifest.json")  # whoever sees the manifest sees a whole artifact
    before = len(s3.calls)
    assert sent(artifact, said) == 0
    assert not any(call.startswith(("Put", "Upload", "Create")) for call in s3.calls[before:])
    assert "all of it was there" in said[-1] and SECRET not in "".join(said)


def test_a_changed_file_is_sent_again_and_only_that(s3, artifact) -> None:
    sent(artifact)
    (artifact / "config.json").write_text('{"a":1}')
    manifested(artifact)
    assert sent(artifact) == sum((artifact / name).stat().st_size for name in ("config.json", "manifest.json"))
    assert on_volume(s3) == expected(artifact)
    weights = artifact / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[60 * 2**10] ^= 1  # the same size
    weights.write_bytes(data)
    manifested(artifact)
    assert sent(artifact) >= len(data)
    assert on_volume(s3) == expected(artifact)


def test_a_cut_upload_goes_on_with_the_first_part_that_is_missing(s3, artifact) -> None:
    parts = 0
    for stop_after in range(1, 40):
        s3.calls.clear()
        s3.stop_after = stop_after
        try:
            sent(artifact, attempts=1)
            break
        except ProviderError as error:
            assert "start again" in str(error) and SECRET not in str(error)
        finally:
            parts += sum(call.startswith("UploadPart") for call in s3.calls[:stop_after])
            s3.stop_after = None
        assert s3.begun("vol1") <= 1
        s3.calls.clear()
    else:
        raise AssertionError("it never ended")
    assert parts == 3  # each part once, however often it was cut
    assert on_volume(s3) == expected(artifact) and s3.begun("vol1") == 0


def test_parts_of_an_earlier_file_are_not_joined_into_this_one(s3, artifact) -> None:
    s3.stop_after = 8
    with pytest.raises(ProviderError):
        sent(artifact, attempts=1)
    assert s3.begun("vol1") == 1
    s3.stop_after = None
    weights = artifact / "model.safetensors"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    manifested(artifact)
    sent(artifact)
    assert on_volume(s3) == expected(artifact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failure_of_any_call_changes_nothing_of_the_result(s3, artifact, kind) -> None:
    sent(artifact)
    total = len(s3.calls)
    with connect(read_timeout_s=1.0) as bucket:
        for number in range(1, total + 1):
            for name in list(s3.objects("vol1")):
                s3.remove("vol1", name)
            s3.calls.clear()
            s3.faults = {number: kind}
            upload(artifact, FOLDER, bucket, lambda line: None)
            assert on_volume(s3) == expected(artifact) and s3.begun("vol1") == 0, f"{kind} at call {number}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_bytes_that_change_on_their_way_are_noticed(s3, artifact, name) -> None:
    s3.damage = name
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        sent(artifact)
    assert not any(key.endswith("manifest.json") for key in s3.objects("vol1"))
    s3.damage = None
    sent(artifact)
    assert on_volume(s3) == expected(artifact)


def test_what_a_pod_left_there_is_taken_as_it_is_or_read_back(s3, artifact) -> None:
    for path in artifact.iterdir():
        s3.direct("PUT", f"/vol1/{FOLDER}/{path.name}", path.read_bytes())
    assert sent(artifact) == 0
    s3.remove("vol1", f"{FOLDER}/model.safetensors")
    with Bucket("vol1", "EU-RO-1", PART + 2**10, 2, 5) as other:  # in other parts: the ETag says nothing of ours
        upload(artifact, FOLDER, other, lambda line: None)
    s3.calls.clear()
    assert sent(artifact, read_timeout_s=5) == 0 and any(call.startswith("GetObject") for call in s3.calls)


def test_a_file_that_a_server_would_load_besides_stops_it(s3, artifact) -> None:
    s3.direct("PUT", f"/vol1/{FOLDER}/model-00002-of-00002.safetensors", b"old")
    with pytest.raises(LoadmasterError, match=r"model-00002-of-00002\.safetensors"):
        sent(artifact)
    assert list(s3.objects("vol1")) == [f"{FOLDER}/model-00002-of-00002.safetensors"]


def test_a_volume_that_is_full_or_a_key_that_is_wrong_is_a_sentence(s3, artifact, monkeypatch) -> None:
    for number in range(1, 60):
        s3.fault(number, "500")
    with pytest.raises(ProviderError, match="volume vol1, list runs/tickets"):
        sent(artifact)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(LoadmasterError, match=r"AWS_SECRET_ACCESS_KEY(.|\n)*--no-upload"):
        connect()


@pytest.mark.parametrize("error", [None, ValueError("Invalid timestamp"), RecursionError()])
def test_an_answer_that_is_none_of_an_s3_api_is_a_sentence(s3, artifact, monkeypatch, error) -> None:
    def answer(**_):
        if error:
            raise error
        return {}

    with connect() as there:
        monkeypatch.setattr(there._s3, "head_object", answer)
        with pytest.raises(ProviderError, match="look at x: the answer is none of an S3 API"):
            there.holds(artifact / "config.json", "x", "0")


def test_settings_for_amazon_are_not_taken(s3, artifact, monkeypatch, tmp_path) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\nregion = moon\ns3 =\n  addressing_style = virtual\n")
    for name, value in {"AWS_PROFILE": "none", "AWS_CONFIG_FILE": str(config), "AWS_SESSION_TOKEN": "t"}.items():
        monkeypatch.setenv(name, value)
    assert sent(artifact) > 0 and on_volume(s3) == expected(artifact)


def test_addresses_are_the_catalogues(monkeypatch) -> None:
    monkeypatch.delenv("RUNPOD_S3_URL", raising=False)
    assert url_of("EU-RO-1") == "https://s3api-eu-ro-1.runpod.io/"
    with pytest.raises(LoadmasterError, match=r"volumes in US-TX-3 have no S3 API(.|\n)*EU-RO-1"):
        url_of("US-TX-3")


def test_the_manifest_on_the_volume_is_the_one_that_was_verified(s3, artifact) -> None:
    sent(artifact)
    assert json.loads(s3.objects("vol1")[f"{FOLDER}/manifest.json"]) == json.loads(
        (artifact / "manifest.json").read_text()
    )
