"""The client asks what the provider's description allows, repeats only what is safe, and shows no secret."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from pydantic import ValidationError

from loadmaster.endpoint.inference import Inference, NotAnswered
from loadmaster.errors import ProviderError
from loadmaster.launch.runpod import Api, NotSent, Patience, Refused, RunpodClient, from_environment
from loadmaster.launch.runpod.rental import alive
from loadmaster.launch.runpod.types import (
    ClusterCompute,
    CreateCluster,
    CreateEndpoint,
    CreateNetworkVolume,
    CreatePod,
    EndpointGpu,
    Mounts,
    NetworkMount,
    Pod,
    PodGpu,
    QueueDelay,
    RequestCount,
    UpdateEndpoint,
    Workers,
    parse,
)
from tests.launch.fake_runpod import FAULTS, FakeRunpod

QUICK = Patience(timeout_s=1.0, attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
A100 = "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def fake():
    with FakeRunpod() as fake:
        yield fake
        assert fake.violations == []


@pytest.fixture
def client(fake):
    with RunpodClient(Api(fake.key, fake.url, QUICK)) as client:
        yield client


def pod_request(name: str = "loadmaster-a", **more) -> CreatePod:
    return CreatePod(name=name, image="example/image:1.0", gpu=PodGpu(A100, 2), **more)


ENDPOINT = CreateEndpoint(
    name="loadmaster-e",
    image="example/worker:1",
    gpu=EndpointGpu(["ADA_48_PRO"], excluded_types=["NVIDIA L40"]),
    scaling=QueueDelay(4),
    workers=Workers(0, 2, 10),
    flashboot="FLASHBOOT",
)


def test_a_pod_from_creation_to_deletion(fake, client):
    volume = client.create_volume(CreateNetworkVolume("loadmaster", 100, "EU-RO-1"))
    mounts = Mounts(network=[NetworkMount(volume.id, "/workspace")])
    made = client.create_pod(
        pod_request(args='python3 -c "1"', disk=40, env={"A": "1"}, mounts=mounts, data_center_ids=["EU-RO-1"])
    )
    assert (made.gpu.id, made.gpu.count, made.cost) == (A100, 2, 3.58)
    assert [pod.id for pod in client.pods()] == [made.id]
    assert client.pod(made.id) == made
    client.delete_pod(made.id)
    client.delete_pod(made.id)
    assert client.pod(made.id) is None and client.pods() == []
    assert [v.name for v in client.volumes()] == ["loadmaster"]
    client.delete_volume(volume.id)
    assert client.volumes() == []


def test_a_cluster_from_creation_to_deletion(fake, client):
    made = client.create_cluster(CreateCluster("loadmaster-c", ClusterCompute(A100, 8, 2), "example/image:1.0"))
    assert len(client.cluster_pods(made.id)) == 2
    assert client.pods() == []
    client.delete_cluster(made.id)
    assert client.clusters() == [] and client.cluster(made.id) is None


def test_an_endpoint_from_creation_to_deletion(fake, client):
    made = client.create_endpoint(ENDPOINT)
    assert made.request_urls["runSync"].endswith("/runsync")
    changed = client.update_endpoint(made.id, UpdateEndpoint(workers=Workers(max=5), scaling=RequestCount(8)))
    assert (changed.workers.max, changed.workers.min, changed.scaling.request_count) == (5, 0, 8)
    assert client.workers(made.id) == []
    client.delete_endpoint(made.id)
    assert client.endpoints() == []


def test_the_catalogue_has_prices_pools_and_stock(fake, client):
    fake.sold_out.add(A100)
    gpus = {gpu.id: gpu for gpu in client.gpus()}
    assert gpus[A100].availability == "NONE" and gpus[A100].data_centers == []
    assert gpus["NVIDIA L40S"].pool == gpus["NVIDIA L40"].pool == "ADA_48_PRO"
    assert gpus["NVIDIA L40S"].price.serverless == 1.91


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("call", [1, 2])
def test_nothing_is_made_twice_whatever_fails(fake, client, kind, call):
    fake.fault(call, kind)
    assert client.create_pod(pod_request()).name == "loadmaster-a"
    assert len(client.pods()) == 1
    assert fake.created == [("pod", "loadmaster-a")]
    client.delete_pod(client.pods()[0].id)
    assert fake.pods == {}


def test_a_first_request_that_was_carried_out_late_leaves_no_twin(fake, client, monkeypatch):
    """Not in the list when it was looked for, there when the second one had been made."""
    fake.fault(1, "lost")
    listed, looks = fake.listPods, []

    def late(ids, query, body):
        looks.append(1)
        return (200, {"pods": []}) if len(looks) == 1 else listed(ids, query, body)

    monkeypatch.setattr(fake, "listPods", late)
    made = client.create_pod(pod_request())
    assert list(fake.pods) == [made.id]
    assert len(fake.created) == 2 and len(fake.deleted) == 1


def test_a_volume_of_the_same_name_is_never_deleted(fake, client):
    """It might be somebody's data, however it came about."""
    fake.fault(1, "lost")
    other = {"id": "vol9", "name": "loadmaster", "size": 10, "dataCenter": "EU-RO-1", "type": "STANDARD"}
    fake.volumes["vol9"] = other
    client.create_volume(CreateNetworkVolume("loadmaster", 100, "EU-RO-1"))
    assert fake.deleted == [] and other in fake.volumes.values()


def test_a_creation_that_fails_for_good_says_so_and_made_one_at_most(fake, client):
    for call in range(1, 30):
        fake.fault(call, "lost")
    with pytest.raises(ProviderError, match=r"(POST|GET) /pods"):
        client.create_pod(pod_request())
    assert len(fake.created) == 1


def test_429_waits_as_long_as_the_provider_asks(fake):
    waits = []
    with RunpodClient(Api(fake.key, fake.url, QUICK, sleep=waits.append)) as client:
        fake.fault(1, "429")
        client.pods()
    assert waits == [0.0]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lambda c: c.create_pod(CreatePod("a", "i:1", PodGpu("NVIDIA NOTHING"))), "unknown GPU type"),
        (lambda c: c.create_volume(CreateNetworkVolume("a", 5, "EU-RO-1")), "less than the minimum of 10"),
        (lambda c: c.update_endpoint("ep9", UpdateEndpoint(timeout=1)), "does not exist any more"),
    ],
)
def test_a_refusal_says_what_the_provider_said_and_is_not_repeated(fake, client, request_, said):
    with pytest.raises(Refused, match=said):
        request_(client)
    assert len(fake.calls) == 1


def test_a_status_that_is_new_at_the_provider_hides_no_pod():
    """One Pod of it, anybody's in the account, made the whole list unreadable, and no Pod was to be found and ended."""
    said = {"id": "p", "name": "theirs", "cost": 1.0, "createdAt": "2026-11-30T05:00:00Z"}
    pods = parse(list[Pod], [{**said, "status": status} for status in ("RUNNING", "MIGRATING", "EXITED")])
    assert [alive(pod) for pod in pods] == [True, True, False]


def test_an_unknown_key_is_refused_before_it_is_sent():
    with pytest.raises(ValidationError, match="Unexpected keyword"):
        CreatePod(name="a", image="i", gpu=PodGpu(A100), dockerStartCmd=["x"])


def test_the_log_is_followed_to_the_end_of_the_pod(fake, client):
    pod = client.create_pod(pod_request())
    fake.say(pod.id, "one")
    fake.say(pod.id, 'two: {"a": 1}')
    events = client.pod_log(pod.id)
    assert [next(events).line, next(events).line] == ["one", 'two: {"a": 1}']
    fake.end_pod(pod.id)
    assert list(events) == []


def test_a_silent_log_raises_and_can_be_taken_up_again(fake, client):
    pod = client.create_pod(pod_request())
    fake.say(pod.id, "one")
    events = client.pod_log(pod.id, idle_s=2)
    first = next(events)
    with pytest.raises(ProviderError, match="no answer within"):
        next(events)
    assert next(client.pod_log(pod.id, since=first.ts)) == first


def test_a_provider_that_was_never_reached_is_given_up_soon_and_said_at_once():
    said, waits = [], []
    api = Api("key-0123456789", "http://127.0.0.1:9", sleep=waits.append, echo=said.append)
    with RunpodClient(api) as client, pytest.raises(NotSent) as raised:
        client.pods()
    assert str(raised.value).startswith("GET /pods: no connection to 127.0.0.1:9 ([Errno 111] Connection refused)")
    assert "RUNPOD_API_BASE_URL_V2, which names this address" in str(raised.value)
    assert len(said) == 1 and said[0].endswith("Connection refused); trying again, 2 times at most")
    assert len(waits) == 2 and sum(waits) < 6


def test_a_provider_that_was_reached_is_waited_for():
    """What was made has to be ended, also after the network was gone for half a minute."""
    waits = []
    with FakeRunpod() as fake:
        api = Api(fake.key, fake.url, sleep=waits.append, echo=lambda text: None)
        client = RunpodClient(api)
        client.pods()
    with client, pytest.raises(NotSent):
        client.delete_pod("pod1")
    assert len(waits) == 5 and sum(waits) > 30


def test_no_secret_in_exceptions_logs_or_reprs(fake, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "hf_VERYSECRETVALUE"
    said = []
    with RunpodClient(Api(fake.key, fake.url, QUICK)) as client:
        made = client.create_pod(pod_request(env={"HF_TOKEN": secret}))
        said += [repr(client.api), repr(made), repr(pod_request(env={"HF_TOKEN": secret}))]
        fake.fault(2, "malformed")
        client.pods()
        for kind in FAULTS:
            fake.faults = dict.fromkeys(range(len(fake.calls) + 1, len(fake.calls) + 20), kind)
            with pytest.raises(ProviderError) as raised:
                client.pod(made.id)
            said += [str(raised.value), repr(raised.value), repr(raised.value.__cause__)]
        fake.faults = {}
    with RunpodClient(Api("wrong-key-1234567", fake.url, QUICK)) as client, pytest.raises(Refused) as refused:
        client.pods()
    assert "is not accepted" in str(refused.value)
    text = "\n".join(said) + caplog.text + str(refused.value)
    assert fake.key not in text and secret not in text and "wrong-key-1234567" not in text


def answered(status: int, content: str) -> Api:
    api = Api("rpa_0123456789abcdef", "http://127.0.0.1:9", QUICK)
    api._client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(status, text=content)))
    return api


def test_no_part_of_a_key_is_in_a_long_answer_that_repeats_it():
    api = answered(400, json.dumps({"detail": "x" * 490 + "rpa_0123456789abcdef"}))
    with RunpodClient(api) as client, pytest.raises(Refused) as raised:
        client.pods()
    assert "x" * 490 + "[key]" in str(raised.value) and "rpa_" not in str(raised.value)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "{}", "[1]", "\ufffe"])
@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_that_is_none_is_said_as_such(status, content):
    with RunpodClient(answered(status, content)) as client, pytest.raises(ProviderError):
        client.pods()
    urls = {name: "http://127.0.0.1:9" for name in ("run", "health", "status", "cancel")}
    with Inference(urls, "key", poll_s=0.001) as endpoint, pytest.raises(NotAnswered):
        endpoint._client = answered(status, content)._client
        endpoint.ask({}, wait_s=1)


def test_the_key_comes_from_the_environment_only(monkeypatch):
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    with pytest.raises(ProviderError, match="RUNPOD_API_KEY is not set"):
        from_environment()
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    monkeypatch.setenv("RUNPOD_API_BASE_URL_V2", "http://127.0.0.1:1/v2/")
    assert from_environment().base_url == "http://127.0.0.1:1/v2"


@pytest.mark.parametrize("url", ["http://[::1]:1", "http://localhost:8080/v2", "https://api.example.org/v2"])
def test_the_key_is_sent_where_nobody_else_reads_it(monkeypatch, url):
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    monkeypatch.setenv("RUNPOD_API_BASE_URL_V2", url)
    assert from_environment().base_url == url


@pytest.mark.parametrize("url", ["http://api.runpod.io/v2", "http://10.0.0.4:8080/v2", "http://localhost.example.org"])
def test_the_key_is_not_sent_in_clear(monkeypatch, url):
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    monkeypatch.setenv("RUNPOD_API_BASE_URL_V2", url)
    with pytest.raises(ProviderError, match=r"RUNPOD_API_BASE_URL_V2 begins with http://.*read the key.*https://HOST"):
        from_environment()
