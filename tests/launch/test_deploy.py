"""Deploying over a fake account and a fake data plane: what is refused, validated, measured, taken back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.config.schema import EndpointConfig, ExportConfig, Job
from loadmaster.endpoint import validate
from loadmaster.endpoint.bundle import write_bundle
from loadmaster.endpoint.deploy import deploy, find, order, ours, owned, scale, write_deployment
from loadmaster.endpoint.inference import Inference, NotAnswered
from loadmaster.errors import ExportRejected, LoadmasterError, StoppedOnRequest
from loadmaster.export.answers import keep
from loadmaster.export.manifest import OWN_DIGEST, write_manifest
from loadmaster.files import read_json, write_json
from loadmaster.launch.runpod import Api, Patience, RunpodClient
from loadmaster.launch.runpod.types import CreateNetworkVolume, body
from loadmaster.launch.volume.bucket import Bucket
from loadmaster.launch.volume.upload import upload
from tests.launch.fake_inference import MODES, FakeInference
from tests.launch.fake_runpod import FAULTS, FakeRunpod
from tests.launch.fake_s3 import ACCESS, SECRET, FakeS3

SMOKE = [
    {
        "messages": [{"role": "user", "content": "Where is the tea?"}], "prompt_tokens": 9,
        "text": "In the second crate.", "tokens": 6, "max_tokens": 32, "finish_reason": "stop",
    },
    {
        "messages": [{"role": "user", "content": "Count."}], "prompt_tokens": 5, "text": "one two three four five six",
        "tokens": 32, "max_tokens": 32, "finish_reason": "length",
    },
]
QUICK = Patience(timeout_s=1.0, attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}
JOB = Job(
    recipe="tickets", sequence_length=512, export=ExportConfig(formats=["bf16"]),
    endpoint=EndpointConfig(gpu="l40s", output_tokens=16, max_slowdown=1e6),  # a busy machine is no slow endpoint
)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "runs/tickets/one"
    export = folder / "export/bf16"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"x" * 100)
    (export / "config.json").write_text(json.dumps(CONFIG))
    manifest = write_manifest(export, {
        "format": "bf16", "recipe": "tickets", "base_model": {"name": "org/base", "revision": None},
        "stop_token_ids": [2], "verification": {"passed": True},
    })
    keep(folder, manifest, SMOKE)
    write_bundle(folder, JOB)
    return folder


@pytest.fixture
def run_dir(bundled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled, tmp_path / "runs/tickets/one"))


def allow(run_dir: Path, slowdown: float) -> None:
    path = run_dir / "bundle/endpoint.json"
    write_json(path, {**read_json(path), "max_slowdown": slowdown})


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


@pytest.fixture
def left_late(fake, monkeypatch):
    """left_late(at): from the `at`-th list of endpoints on there is one more, which a lost request made."""
    listed, created, seen, late = fake.listEndpoints, fake.createEndpoint, [], []

    def create(ids, query, body):
        if not late:
            late.append(body)
        return created(ids, query, body)

    def after(at: int) -> None:
        def answer(ids, query, body):
            seen.append(bool(late))
            if sum(seen) == at and late:
                fake.endpoints["late"] = fake._endpoint("late", {"env": {}, **late[0]})
            return listed(ids, query, body)

        monkeypatch.setattr(fake, "createEndpoint", create)
        monkeypatch.setattr(fake, "listEndpoints", answer)

    return after


def test_an_endpoint_that_a_lost_request_made_late_is_deleted(run_dir, client, fake, volume, said, left_late):
    """`_create` has listed once, deploy once after it; the third list is the one after validation."""
    left_late(3)
    fake.named_faults = {("createEndpoint", 1): "500"}
    found = try_deploy(run_dir, client, fake, volume, said)
    assert list(fake.endpoints) == [found["endpoint"]] and "made twice, by one request" in " ".join(said)


def test_an_endpoint_whose_making_was_interrupted_is_looked_for_until_it_is_there(
    run_dir, client, fake, volume, said, monkeypatch
):
    """Ctrl-C while the request is on its way, and the provider carries it out a moment after."""
    made = lambda: fake._endpoint("late", {**fake.bodies[-1], "env": {}})  # noqa: E731

    def interrupted(request):
        fake.bodies.append(body(request))
        raise StoppedOnRequest("now")

    monkeypatch.setattr(client, "create_endpoint", interrupted)
    slept = lambda seconds: fake.endpoints.update(late=made())  # noqa: E731
    with pytest.raises(StoppedOnRequest):
        try_deploy(run_dir, client, fake, volume, said, sleep=slept)
    assert fake.endpoints == {} and fake.deleted == [("endpoint", "late")]


def try_deploy(run_dir, client, fake, volume, said, mode="good", faults=None, **options):
    with FakeInference(mode, answers=SMOKE) as data_plane:
        data_plane.faults = faults or {}
        connect = lambda _: Inference(data_plane.urls, fake.key, poll_s=0.01, timeout_s=1.0)  # noqa: E731
        try:
            return deploy(
                order(run_dir, volume), client, connect, start_s=options.pop("start_s", 5.0), echo=said.append,
                sleep=options.pop("sleep", lambda seconds: None), **options,
            )
        finally:
            assert data_plane.keys <= {f"Bearer {fake.key}"}
            assert fake.key not in "".join(said)
            if mode == "silent":
                assert data_plane.cancelled and not data_plane.running()
            fake.data_plane_calls = len(data_plane.calls)


def test_an_endpoint_is_made_asked_measured_and_recorded(run_dir, client, fake, volume, said) -> None:
    deployed = try_deploy(run_dir, client, fake, volume, said)
    (endpoint,) = fake.endpoints.values()
    assert endpoint["networkVolumes"] == [volume] and endpoint["dataCenterIds"] == ["EU-RO-1"]
    assert endpoint["gpu"]["pools"] == ["ADA_48_PRO"] and endpoint["gpu"]["excludedTypes"] == ["NVIDIA L40"]
    assert endpoint["env"]["MODEL_NAME"] == "/runpod-volume/runs/tickets/one/export/bf16"
    assert endpoint["flashboot"] == "FLASHBOOT" and endpoint["workers"] == {"min": 0, "max": 2, "idleTimeout": 10}
    assert deployed["smoke"]["equal"] == 2 and deployed["smoke"]["similarity"] == 1
    measured, planned = deployed["measured"], deployed["planned"]
    assert measured["requests"] == 8 and measured["first_token_s"] > 0 and measured["tokens_per_second"] > 0
    assert 0 < measured["prompt_tokens"] <= planned["prompt_tokens"] == 384 and planned["output_tokens"] == 16
    assert deployed["max_slowdown"] == 1e6 and planned["tokens_per_second_each"] > 100
    path = write_deployment(run_dir, deployed)
    assert read_json(path)["endpoint"] == endpoint["id"] and fake.key not in path.read_text()


def test_a_second_deployment_updates_the_first_in_place(run_dir, client, fake, volume, said) -> None:
    first = try_deploy(run_dir, client, fake, volume, said)
    write_bundle(run_dir, replace(JOB, endpoint=replace(JOB.endpoint, min_workers=1, idle_timeout_s=60)))
    second = try_deploy(run_dir, client, fake, volume, said)
    assert first["endpoint"] == second["endpoint"] and len(fake.endpoints) == 1
    assert fake.endpoints[first["endpoint"]]["workers"] == {"min": 1, "max": 2, "idleTimeout": 60}


def test_what_is_as_it_should_be_is_asked_and_not_changed(run_dir, client, fake, volume, said) -> None:
    first = try_deploy(run_dir, client, fake, volume, said)
    assert first["name"] == "loadmaster-tickets-bf16 -fb"  # as the service has it with FlashBoot
    before = len(fake.calls)
    assert try_deploy(run_dir, client, fake, volume, said)["endpoint"] == first["endpoint"]
    assert all(call.startswith("GET") for call in fake.calls[before:])
    with pytest.raises(NotAnswered):
        try_deploy(run_dir, client, fake, volume, said, "failed")
    assert len(fake.endpoints) == 1  # this call made nothing, so there is nothing to take back


def test_an_update_waits_until_the_old_workers_are_gone(run_dir, client, fake, volume, said) -> None:
    id = try_deploy(run_dir, client, fake, volume, said)["endpoint"]
    worker = {"id": "w1", "status": "RUNNING", "gpuCount": 1, "isStale": True, "version": 1, "image": "x"}
    fake.workers[id] = [worker]
    write_bundle(run_dir, replace(JOB, endpoint=replace(JOB.endpoint, max_model_len=256)))
    listed, seen = fake.listEndpointWorkers, []

    def listing(*arguments):
        seen.append(len(seen))
        if len(seen) == 3:
            fake.workers[id] = []
        return listed(*arguments)

    fake.listEndpointWorkers = listing
    try_deploy(run_dir, client, fake, volume, said)
    assert len(seen) == 3 and any("waiting for 1 worker of" in line for line in said)


def test_a_volume_goes_by_its_name_too(run_dir, client, fake, volume, said) -> None:
    try_deploy(run_dir, client, fake, "loadmaster-v", said)
    (endpoint,) = fake.endpoints.values()
    assert endpoint["networkVolumes"] == [volume]
    fake.volumes["twin"] = {**fake.volumes[volume], "id": "twin"}
    with pytest.raises(LoadmasterError, match="several network volumes are called loadmaster-v"):
        try_deploy(run_dir, client, fake, "loadmaster-v", said)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "good"])
def test_an_endpoint_that_does_not_serve_is_deleted_again(
    run_dir, client, fake, volume, said, mode, monkeypatch
) -> None:
    monkeypatch.setattr(validate, "NETWORK_S", 0.1)
    if mode in ("slow", "late"):
        allow(run_dir, 5.0)
    with pytest.raises(NotAnswered, match="does not serve as it should"):
        try_deploy(run_dir, client, fake, volume, said, mode, start_s=0.2)
    assert fake.endpoints == {} and "is deleted" in said[-1]


@pytest.mark.parametrize(
    ("mode", "said_so"),
    [
        (
            "other_texts",
            r"not those of the artifact: 0\.\d\d of the words(.|\n)*Quite another model(.|\n)*second crate",
        ),
        ("goes_on", "ends with 'length', not as it did"),
        ("slow", r"comes at \d+\.\d tokens/s, planned (.|\n)*endpoint\.max_slowdown=5 is the limit"),
    ],
)
def test_why_it_is_taken_back_is_said_with_the_number(run_dir, client, fake, volume, said, mode, said_so) -> None:
    if mode == "slow":
        allow(run_dir, 5.0)
    with pytest.raises(NotAnswered, match=said_so):
        try_deploy(run_dir, client, fake, volume, said, mode)


def test_how_much_slower_it_may_be_is_the_jobs_to_say(run_dir, client, fake, volume, said) -> None:
    assert read_json(run_dir / "bundle/endpoint.json")["max_slowdown"] == 1e6
    assert try_deploy(run_dir, client, fake, volume, said, "slow")["measured"]["tokens_per_second_each"] < 40


def test_without_recorded_answers_it_is_asked_all_the_same_and_says_so(run_dir, client, fake, volume, said) -> None:
    write_json(run_dir / "bundle/smoke.json", {"model": "tickets", "prompts": []})
    deployed = try_deploy(run_dir, client, fake, volume, said)
    assert deployed["smoke"]["prompts"] == [{"text": "Hello.", "finish_reason": "stop"}]
    assert any("no answers are recorded" in line for line in said)


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
    for number in range(6, 17):
        fake.fault(len(fake.calls) + number, "500")
    with pytest.raises(NotAnswered, match="CUDA out of memory"):
        try_deploy(run_dir, client, fake, volume, said, "failed")
    assert len(fake.endpoints) == 1
    assert "loadmaster endpoint delete loadmaster-tickets-bf16" in said[-1]


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
    served = {"passed": False, "failures": ["tuned_share is 0.02"]}
    for when, refused in (("2999-01-01T00:00:00+00:00", True), ("2000-01-01T00:00:00+00:00", False)):
        write_json(run_dir / "serve-check.json", {"created_utc": when, "formats": {"bf16": served}})
        with pytest.raises(ExportRejected, match=r"tuned_share is 0\.02") if refused else contextlib.nullcontext():
            order(run_dir, volume)
    served |= {"checked": False}
    write_json(run_dir / "serve-check.json", {"created_utc": "2999-01-01T00:00:00+00:00", "formats": {"bf16": served}})
    order(run_dir, volume)
    facts = {key: value for key, value in read_json(manifest).items() if key not in ("files", OWN_DIGEST)}
    write_manifest(manifest.parent, {**facts, "verification": {"passed": False}})
    with pytest.raises(ExportRejected, match="did not pass verification"):
        order(run_dir, volume)


def test_what_is_missing_is_said_with_what_would_do(run_dir, tmp_path, client, fake, said) -> None:
    with pytest.raises(LoadmasterError, match=r"`loadmaster deploy \S+ --volume NAME`, by name or id"):
        order(run_dir, None)
    with pytest.raises(LoadmasterError, match="no network volume vol_none"):
        try_deploy(run_dir, client, fake, "vol_none", said)
    assert fake.endpoints == {}
    write_bundle(run_dir, replace(JOB, endpoint=EndpointConfig(worker="handler")))
    with pytest.raises(LoadmasterError, match="docker build"):
        order(run_dir, "v")
    with pytest.raises(LoadmasterError, match="no bundle"):
        order(tmp_path, "v")
    (run_dir / "bundle/smoke.json").unlink()
    with pytest.raises(LoadmasterError, match="earlier version"):
        order(run_dir, "v")


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("mode", ["good", "failed"])
def test_a_failure_of_any_call_leaves_one_endpoint_or_none(run_dir, client, fake, volume, said, kind, mode) -> None:
    """Volumes, cards, list, creation, list, and deletion when it does not serve: each call spoilt once."""
    for number in range(1, 8):
        fake.fault(len(fake.calls) + number, kind)
        with contextlib.nullcontext() if mode == "good" else pytest.raises(NotAnswered):
            try_deploy(run_dir, client, fake, volume, said, mode)
        assert len(fake.endpoints) == (1 if mode == "good" else 0), f"{kind} at call {number}"
        fake.faults.clear()
        for id in list(fake.endpoints):
            client.delete_endpoint(id)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failure_of_any_call_to_the_endpoint_is_overcome(run_dir, client, fake, volume, said, kind) -> None:
    """Jobs, polls, streams: each spoilt once, all of them in a few deployments."""
    try_deploy(run_dir, client, fake, volume, said)
    total = fake.data_plane_calls
    for first in range(1, 4):
        try_deploy(run_dir, client, fake, volume, said, faults=dict.fromkeys(range(first, 2 * total, 3), kind))
    assert len(fake.endpoints) == 1


def test_control_c_while_it_is_made_deletes_what_may_be_there(run_dir, client, fake, volume, said, monkeypatch) -> None:
    made = client.create_endpoint

    def interrupted(request):
        made(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "create_endpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        try_deploy(run_dir, client, fake, volume, said)
    assert fake.endpoints == {} and "is deleted" in said[-1]


def test_the_artifact_is_on_the_volume_before_the_endpoint_is_made(run_dir, client, fake, volume, said, monkeypatch):
    with FakeS3([volume]) as s3:
        for name, value in {
            "RUNPOD_S3_URL": s3.url,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            monkeypatch.setenv(name, value)
        wanted = order(run_dir, volume)

        def put(found) -> None:
            assert fake.endpoints == {}
            with Bucket(found.id, found.data_center) as bucket:
                upload(wanted.artifact, wanted.volume_path, bucket, said.append)

        deployed = try_deploy(run_dir, client, fake, volume, said, put=put)
        path = fake.endpoints[deployed["endpoint"]]["env"]["MODEL_NAME"]
        there = {name for name in s3.objects(volume)}
        assert {f"/runpod-volume/{name}" for name in there} == {
            f"{path}/{name}" for name in ("config.json", "manifest.json", "model.safetensors")
        }
        s3.damage = "model.safetensors"
        client.delete_endpoint(deployed["endpoint"])
        s3.remove(volume, path.removeprefix("/runpod-volume/") + "/model.safetensors")
        with pytest.raises(LoadmasterError, match="is not what was sent"):
            try_deploy(run_dir, client, fake, volume, said, put=put)
        assert fake.endpoints == {} and SECRET not in "".join(said)


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
    with pytest.raises(LoadmasterError, match="is 0 or more"):
        scale(client, endpoint, -1, None)
    with pytest.raises(LoadmasterError, match="cannot both hold"):
        scale(client, endpoint, 9, None)
