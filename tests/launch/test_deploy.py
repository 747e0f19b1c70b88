"""Deploying over a fake account and a fake data plane: what is refused, validated, measured, taken back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.config.schema import EndpointConfig, ExportConfig, Job
from loadmaster.endpoint.bundle import write_bundle
from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.export.manifest import write_manifest
from loadmaster.files import read_json, write_json
from loadmaster.launch.deploy import deploy, find, order, ours, owned, scale, write_deployment
from loadmaster.launch.inference import Inference, NotAnswered
from loadmaster.launch.runpod import Api, Patience, RunpodClient
from loadmaster.launch.runpod.types import CreateNetworkVolume
from tests.launch.fake_inference import MODES, FakeInference
from tests.launch.fake_runpod import FAULTS, FakeRunpod

QUICK = Patience(timeout_s=0.25, attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
JOB = Job(
    recipe="tickets", sequence_length=512, export=ExportConfig(formats=["bf16"]), endpoint=EndpointConfig(gpu="l40s")
)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs/tickets/one"
    export = folder / "export/bf16"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"x" * 100)
    (export / "config.json").write_text(json.dumps(CONFIG))
    write_manifest(export, {
        "format": "bf16", "recipe": "tickets", "base_model": {"name": "org/base", "revision": None},
        "stop_token_ids": [2], "verification": {"passed": True},
    })  # fmt: skip
    write_bundle(folder, JOB)
    return folder


@pytest.fixture
def fake() -> Iterator[FakeRunpod]:
    with FakeRunpod() as fake:
        yield fake
        assert fake.violations == []


@pytest.fixture
def client(fake: FakeRunpod) -> Iterator[RunpodClient]:
    with RunpodClient(Api(fake.key, fake.url, QUICK)) as client:
        yield client


@pytest.fixture
def volume(client: RunpodClient) -> str:
    return client.create_volume(CreateNetworkVolume("loadmaster-v", 50, "EU-RO-1")).id


@pytest.fixture
def said() -> list[str]:
    return []


def try_deploy(run_dir, client, fake, volume, said, mode="good", **options):
    with FakeInference(mode) as data_plane:
        try:
            return deploy(
                order(run_dir, volume), client, lambda _: Inference(data_plane.urls, fake.key, poll_s=0.01),
                start_s=options.pop("start_s", 5.0), echo=said.append, **options,
            )  # fmt: skip
        finally:
            assert data_plane.keys <= {f"Bearer {fake.key}"}
            assert fake.key not in "".join(said)
            if mode == "silent":
                assert data_plane.cancelled


def test_an_endpoint_is_made_asked_measured_and_recorded(run_dir, client, fake, volume, said) -> None:
    deployed = try_deploy(run_dir, client, fake, volume, said)
    (endpoint,) = fake.endpoints.values()
    assert endpoint["networkVolumes"] == [volume] and endpoint["dataCenterIds"] == ["EU-RO-1"]
    assert endpoint["gpu"]["pools"] == ["ADA_48_PRO"] and endpoint["gpu"]["excludedTypes"] == ["NVIDIA L40"]
    assert endpoint["env"]["MODEL_NAME"] == "/runpod-volume/runs/tickets/one/export/bf16"
    assert endpoint["flashboot"] == "FLASHBOOT" and endpoint["workers"] == {"min": 0, "max": 2, "idleTimeout": 10}
    assert deployed["answer"]["text"] == "Hello." and deployed["answer"]["finish_reason"] == "stop"
    measured = deployed["measured"]
    assert measured["requests"] == 8 and 0 < measured["first_token_s"] < 1 and measured["tokens_per_second"] > 10
    assert deployed["planned"]["gpu"] == "l40s"
    path = write_deployment(run_dir, deployed)
    assert read_json(path)["endpoint"] == endpoint["id"] and fake.key not in path.read_text()


def test_a_second_deployment_updates_the_first_in_place(run_dir, client, fake, volume, said) -> None:
    first = try_deploy(run_dir, client, fake, volume, said)
    write_bundle(run_dir, replace(JOB, endpoint=replace(JOB.endpoint, min_workers=1, idle_timeout_s=60)))
    second = try_deploy(run_dir, client, fake, volume, said)
    assert first["endpoint"] == second["endpoint"] and len(fake.endpoints) == 1
    assert fake.endpoints[first["endpoint"]]["workers"] == {"min": 1, "max": 2, "idleTimeout": 60}


def test_the_name_that_flashboot_gives_is_found_again(run_dir, client, fake, volume, said) -> None:
    first = try_deploy(run_dir, client, fake, volume, said)
    fake.endpoints[first["endpoint"]]["name"] += " -fb"
    assert try_deploy(run_dir, client, fake, volume, said)["endpoint"] == first["endpoint"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "good"])
def test_an_endpoint_that_does_not_serve_is_deleted_again(run_dir, client, fake, volume, said, mode) -> None:
    with pytest.raises(NotAnswered, match="does not serve as it should"):
        try_deploy(run_dir, client, fake, volume, said, mode, start_s=0.2)
    assert fake.endpoints == {} and "is deleted" in said[-1]


def test_an_update_that_does_not_serve_is_put_back(run_dir, client, fake, volume, said) -> None:
    first = try_deploy(run_dir, client, fake, volume, said)["endpoint"]
    before = json.loads(json.dumps(fake.endpoints[first]))
    write_bundle(run_dir, replace(JOB, endpoint=replace(JOB.endpoint, gpu="h100_80gb", min_workers=1)))
    with pytest.raises(NotAnswered, match="vLLM returned HTTP 404"):
        try_deploy(run_dir, client, fake, volume, said, "error_inside")
    after = fake.endpoints[first]
    assert {key: after[key] for key in before if key != "gpu"} == {k: v for k, v in before.items() if k != "gpu"}
    assert after["gpu"]["pools"] == ["ADA_48_PRO"]


def test_what_fails_is_kept_when_asked(run_dir, client, fake, volume, said) -> None:
    with pytest.raises(NotAnswered):
        try_deploy(run_dir, client, fake, volume, said, "failed", keep=True)
    assert len(fake.endpoints) == 1 and "is kept" in said[-1]


def test_what_cannot_be_taken_back_is_said_with_its_id(run_dir, client, fake, volume, said) -> None:
    for number in range(5, 12):
        fake.fault(len(fake.calls) + number, "500")
    with pytest.raises(NotAnswered, match="CUDA out of memory"):
        try_deploy(run_dir, client, fake, volume, said, "failed")
    (id,) = fake.endpoints
    assert f"loadmaster endpoint delete {id}" in said[-1]


def test_control_c_while_it_is_validated_takes_it_back(run_dir, client, fake, volume, said) -> None:
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(order(run_dir, volume), client, interrupted, echo=said.append)
    assert fake.endpoints == {}


def test_a_changed_or_foreign_artifact_is_refused_before_anything_is_made(run_dir, fake, volume) -> None:
    weights = run_dir / "export/bf16/model.safetensors"
    weights.write_bytes(b"y" * 100)
    with pytest.raises(ExportRejected, match="changed since it was exported"):
        order(run_dir, volume)
    weights.write_bytes(b"x" * 100)
    order(run_dir, volume)
    manifest = run_dir / "export/bf16/manifest.json"
    write_json(manifest, {**read_json(manifest), "verification": {"passed": False}})
    with pytest.raises(ExportRejected, match="did not pass verification"):
        order(run_dir, volume)


def test_what_is_missing_is_said_with_what_would_do(run_dir, tmp_path, client, fake, said) -> None:
    with pytest.raises(LoadmasterError, match=r"--volume ID"):
        order(run_dir, None)
    with pytest.raises(LoadmasterError, match="no network volume vol_none"):
        try_deploy(run_dir, client, fake, "vol_none", said)
    assert fake.endpoints == {}
    write_bundle(run_dir, replace(JOB, endpoint=EndpointConfig(worker="handler")))
    with pytest.raises(LoadmasterError, match="docker build"):
        order(run_dir, "v")
    with pytest.raises(LoadmasterError, match="no bundle"):
        order(tmp_path, "v")


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("mode", ["good", "failed"])
def test_a_failure_of_any_call_leaves_one_endpoint_or_none(run_dir, client, fake, volume, said, kind, mode) -> None:
    """Volume, cards, list, creation, and deletion when the endpoint does not serve: each call spoilt once."""
    for number in range(1, 6):
        fake.fault(len(fake.calls) + number, kind)
        with contextlib.nullcontext() if mode == "good" else pytest.raises(NotAnswered):
            try_deploy(run_dir, client, fake, volume, said, mode)
        assert len(fake.endpoints) == (1 if mode == "good" else 0), f"{kind} at call {number}"
        fake.faults.clear()
        for id in list(fake.endpoints):
            client.delete_endpoint(id)


def test_endpoints_are_listed_scaled_and_only_ours(run_dir, client, fake, volume, said) -> None:
    made = try_deploy(run_dir, client, fake, volume, said)["endpoint"]
    fake.endpoints["other"] = {**fake.endpoints[made], "id": "other", "name": "somebody's"}
    assert [endpoint.id for endpoint in ours(client)] == [made]
    endpoint = owned(client, "loadmaster-tickets-bf16")
    assert endpoint.id == made == find(client, endpoint.name).id
    with pytest.raises(LoadmasterError, match=f"{made}"):
        owned(client, "other")
    assert scale(client, endpoint, 1, 4).workers.max == 4
    assert fake.endpoints[made]["workers"] == {"min": 1, "max": 4, "idleTimeout": 10}
    with pytest.raises(LoadmasterError, match="cannot both hold"):
        scale(client, endpoint, 9, None)
