"""Several nodes: Instant Clusters, and plain Pods where forced, at the fake provider; each node is a real process."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.errors import ConfigError, LoadmasterError, ProviderError, StoppedOnRequest
from loadmaster.launch import job as job_module
from loadmaster.launch import order, rented
from loadmaster.launch.job import launch_job
from loadmaster.launch.machines import list_pods, sweep_pods
from tests.launch import openapi
from tests.launch.fake_runpod import FAULTS
from tests.launch.place import SECRET, everything_written, press, wait_until, when
from tests.launch.test_launch_job import scripted

ROOT = Path(__file__).resolve().parents[2]
TWO = ["launch.nodes=2", "launch.gpus=['h100_80gb:1']"]
PLAIN = ["launch.nodes=2", "launch.gpus=['l40s:1']", "launch.force_pods=true", "launch.max_hours=1"]
real = order.command


def log_of(place) -> str:
    (log,) = (place.folder / "runs").rglob("pod.log")
    return log.read_text()


def nothing_left(fake) -> bool:
    return fake.pods == {} and fake.clusters == {}


def test_a_cluster_is_made_followed_on_all_nodes_and_terminated(place):
    assert place.launch(*TWO, "launch.secrets.HF_TOKEN=hf", "launch.env.STAND_IN_S='0.4'") == 0
    assert nothing_left(place.fake) and [kind for kind, _ in place.fake.created] == ["volume", "cluster"]
    body = place.fake.bodies[-1]
    assert body["type"] == "TRAINING"
    assert body["compute"] == {"gpuTypeId": "NVIDIA H100 80GB HBM3", "gpuCountPerPod": 1, "podCount": 2}
    assert body["mounts"]["network"][0]["path"] == "/workspace"
    text = log_of(place)
    assert "[0] node 0 of 2 at 127.0.0.1" in text and "[1] node 1 of 2 at 127.0.0.1" in text
    assert "[1] token is [HF_TOKEN]" in text
    assert place.said.count("step 3 of 6, loss 1.5000") == 1
    assert "$7.98/h" in place.said and "list price of Pods" in place.said
    (run,) = (place.folder / "runs" / "qlora_8b").iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 3
    record = json.loads((run / "launch.json").read_text())
    assert record["kind"] == "Instant Cluster" and record["nodes"] == 2
    written = place.said + everything_written(place.folder) + json.dumps(place.fake.logs)
    assert SECRET not in written and place.fake.key not in written and "podkey_" not in written


def test_the_hardware_of_a_recipe_names_the_cluster(place):
    place.fake.runner = lambda fake, id: scripted(fake, id)
    assert place.launch("hardware=h100_80gb_x8_n2") == 0
    assert place.fake.bodies[-1]["compute"] == {
        "gpuTypeId": "NVIDIA H100 80GB HBM3", "gpuCountPerPod": 8, "podCount": 2,
    }


@pytest.mark.slow
def test_every_fault_at_every_call_of_a_cluster_launch_leaves_nothing_and_makes_nothing_twice(place):
    """By operation: two logs are read at once, so the order of all calls is not fixed."""
    fake = place.fake
    fake.runner = scripted
    composed = place.composed(*TWO)
    launch_job(composed, place.console, place.provider, tokens=200_000)
    calls = {(name, fake.named_calls[: at + 1].count(name)) for at, name in enumerate(fake.named_calls)}
    assert {name for name, _ in calls} >= {"createCluster", "listClusterPods", "getPodLogs", "deleteCluster"}
    for kind in FAULTS:
        for call in sorted(calls):
            fake.named_calls.clear()
            fake.created.clear()
            fake.volumes.clear()
            fake.named_faults = {call: kind}
            assert launch_job(composed, place.console, place.provider, tokens=200_000) == 0, (kind, call)
            assert nothing_left(fake), (kind, call)
            assert sorted(thing for thing, _ in fake.created) == ["cluster", "volume"], (kind, call)
    assert fake.key not in place.said + everything_written(place.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timeout", "lost"])
def test_when_the_provider_fails_for_good_the_cluster_ends_itself(place, kind, monkeypatch):
    """Nothing answers the launcher from the first log on; the nodes, with their own keys, end their cluster."""
    made = job_module.make_order

    def soon(*arguments):
        ordered = made(*arguments)
        job = json.loads(ordered.env["LOADMASTER_JOB"]) | {"hold_s": 0.3}
        return replace(ordered, env={**ordered.env, "LOADMASTER_JOB": json.dumps(job)})

    monkeypatch.setattr(job_module, "make_order", soon)
    dead = ("listClusterPods", "getCluster", "listClusters", "deleteCluster", "listPods", "getPodLogs")
    place.fake.named_faults = {(name, number): kind for name in dead for number in range(1, 50_000)}
    with pytest.raises(LoadmasterError, match=r"are over|is gone"):
        place.launch(*TWO, "launch.env.STAND_IN_S='30'", "launch.env.STAND_IN_DEAF='1'", "launch.max_hours=0.001")
    assert "ATTENTION" in place.said
    wait_until(lambda: nothing_left(place.fake))


def test_a_cluster_that_nobody_watches_ends_itself_at_its_deadline(place):
    composed = place.composed(*TWO, "launch.env.STAND_IN_S='30'", "launch.max_hours=0.0004")
    offers = place.provider.offers(["h100_80gb"], (1,), "secure", 2)
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    ordered = job_module.make_order(composed, choice, "loadmaster-alone", time.time(), place.fake.url, None, ())
    place.provider.rent(ordered)
    assert len(place.fake.pods) == 2
    wait_until(lambda: nothing_left(place.fake))
    assert [call for call in place.fake.calls if call.startswith("DELETE")] == []


def test_a_node_that_ends_well_before_node_0_ends_nothing(place, monkeypatch):
    made = job_module.make_order

    def impatient(*arguments):
        ordered = made(*arguments)
        job = json.loads(ordered.env["LOADMASTER_JOB"]) | {"hold_s": 2}
        return replace(ordered, env={**ordered.env, "LOADMASTER_JOB": json.dumps(job)})

    monkeypatch.setattr(job_module, "make_order", impatient)
    assert place.launch(*TWO, "launch.env.STAND_IN_S_0='3.5'", "launch.env.STAND_IN_S_1='0'") == 0
    assert "brought back" in place.said and "[1] ended with exit code 0" in place.said


def test_a_node_that_fails_ends_the_cluster_though_the_first_one_hangs(place, monkeypatch):
    monkeypatch.setattr(rented, "NODE_GRACE_S", 0.3)
    words = ["launch.env.STAND_IN_S_0='30'", "launch.env.STAND_IN_CODE_1='7'"]
    assert place.launch(*TWO, *words) == 7
    assert nothing_left(place.fake) and "[1] ended with exit code 7" in place.said


@pytest.mark.slow
def test_a_node_that_vanishes_is_an_error_with_the_log_saved(place):
    def kill():
        with place.fake.lock:
            place.fake.pods[list(place.fake.pods)[1]]["status"] = "EXITED"
        place.fake.drop_log_after = 1

    when(lambda: "token is" in place.said, kill)
    with pytest.raises(ProviderError, match=r"Instant Cluster is 1 EXITED, 1 RUNNING"):
        place.launch(*TWO, "launch.env.STAND_IN_S='30'")
    assert nothing_left(place.fake) and "token is" in log_of(place)


def test_ctrl_c_ends_the_cluster_and_the_checkpoints_stay(place):
    when(lambda: len(place.fake.logs) == 2, press)
    with pytest.raises(StoppedOnRequest, match="on the volume"):
        place.launch(*TWO, "launch.env.STAND_IN_S='30'")
    assert nothing_left(place.fake) and len(place.fake.volumes) == 1


def test_all_nodes_are_told_to_save_a_checkpoint_before_the_limit(place):
    assert place.launch(*TWO, "launch.env.STAND_IN_S='30'", "launch.max_hours=0.001") == 143
    assert nothing_left(place.fake)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["launch.max_hours=0.0005", "launch.max_usd=0.004"])
def test_the_limits_end_a_cluster_that_does_not_listen(place, limit):
    words = [*TWO, "launch.env.STAND_IN_S='30'", "launch.env.STAND_IN_DEAF='1'", limit]
    with pytest.raises(LoadmasterError, match=r"are over|is gone"):  # by the launcher's clock, or the machines' own
        launch_job(place.composed(*words), place.console, place.provider, tokens=None)
    assert nothing_left(place.fake)


def test_a_cluster_that_costs_more_than_allowed_is_ended_at_once(place, monkeypatch):
    dear = place.fake._pod
    monkeypatch.setattr(place.fake, "_pod", lambda *arguments: dear(*arguments) | {"cost": 9.0})
    with pytest.raises(ProviderError, match=r"billed at \$18\.00/h, over max_usd_per_hour=10"):
        place.launch(*TWO, "launch.max_usd_per_hour=10", "launch.env.STAND_IN_S='30'")
    assert nothing_left(place.fake)


def test_clusters_are_listed_with_their_cost_and_swept(place):
    place.fake.runner = None
    composed = place.composed(*TWO)
    offers = place.provider.offers(["h100_80gb"], (1,), "secure", 2)
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    for name, start in (("loadmaster-young", time.time()), ("loadmaster-old", time.time() - 900_000)):
        place.provider.rent(job_module.make_order(composed, choice, name, start, place.fake.url, None, ()))
    assert list_pods(place.console, place.provider) == 0
    assert "Instant Cluster" in place.said and "7.98" in place.said and "past its deadline" in place.said
    assert sweep_pods(place.console, True, provider=place.provider) == 0
    assert [cluster["name"] for cluster in place.fake.clusters.values()] == ["loadmaster-young"]
    assert sweep_pods(place.console, True, everything=True, provider=place.provider) == 0
    assert nothing_left(place.fake)


def test_a_cluster_that_has_no_machines_yet_is_no_orphan(place):
    place.fake.runner = None
    composed = place.composed(*TWO)
    offers = place.provider.offers(["h100_80gb"], (1,), "secure", 2)
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    place.provider.rent(job_module.make_order(composed, choice, "loadmaster-x", time.time(), place.fake.url, None, ()))
    place.fake.pods.clear()
    assert sweep_pods(place.console, True, provider=place.provider) == 0
    assert len(place.fake.clusters) == 1
    next(iter(place.fake.clusters.values()))["createdAt"] = "2026-01-01T00:00:00Z"
    assert sweep_pods(place.console, True, provider=place.provider) == 0
    assert place.fake.clusters == {} and "got no machines" in place.said


@pytest.mark.parametrize(
    ("words", "operations"), [(TWO, ["createCluster"]), (PLAIN, ["createPod", "createPod"])], ids=["cluster", "plain"]
)
def test_a_dry_run_prints_requests_that_the_provider_would_take(place, words, operations):
    assert place.launch(*words, "launch.dry_run=true") == 0
    assert place.fake.created == []
    requests = json.loads(place.said[place.said.index("\n[\n") :])
    for request, operation in zip(requests, ["createNetworkVolume", *operations], strict=True):
        schema = openapi.DESCRIPTION["operations"][operation]["request"]
        assert openapi.errors(schema, request["body"]) == []


# ------------------------------------------------------------ plain Pods, where forced


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.nodes=2", "launch.gpus=[l40s]"], "100 Mbit/s"),
        (["launch.nodes=2", "hardware=l40s_x1"], "100 Mbit/s"),
        (["launch.nodes=2", "launch.gpus=[l40s]", "launch.force_pods=true"], "launch.max_hours"),
        (["launch.nodes=2", "launch.volume=null"], "one folder"),
        (["launch.nodes=3", "hardware=h100_80gb_x8_n2"], "says otherwise"),
    ],
)
def test_what_several_nodes_cannot_do_is_refused_with_the_reason(place, words, said):
    with pytest.raises(ConfigError, match=said):
        place.launch(*words)
    assert place.fake.calls == []


def test_forced_plain_pods_know_each_other_and_are_ended_together(place):
    assert place.launch(*PLAIN, "launch.env.STAND_IN_S='0.3'") == 0
    assert nothing_left(place.fake) and [kind for kind, _ in place.fake.created] == ["volume", "pod", "pod"]
    first, second = place.fake.bodies[-2:]
    assert first["globalNetworking"] and second["globalNetworking"]
    assert second["env"]["MASTER_ADDR"].endswith(".runpod.internal")
    assert (first["env"]["NODE_RANK"], second["env"]["NODE_RANK"]) == ("0", "1")
    assert "[1] node 1 of 2 at pod" in log_of(place)
    assert "the plan's speed and cost are for a cluster's network" in place.said


def test_when_the_second_plain_pod_is_not_to_be_had_the_first_is_given_back(place, monkeypatch):
    create = place.fake.createPod

    def one_only(ids, query, body):
        if body["name"].endswith("node1"):
            place.fake.sold_out.add(body["gpu"]["id"])
        try:
            return create(ids, query, body)
        finally:
            place.fake.sold_out.clear()

    monkeypatch.setattr(place.fake, "createPod", one_only)
    with pytest.raises(ProviderError, match="could not be rented"):
        place.launch(*PLAIN)
    assert nothing_left(place.fake) and place.fake.volumes == {}


def test_a_group_of_plain_pods_is_one_line_and_is_swept_as_one(place):
    place.fake.runner = None
    composed = place.composed(*PLAIN)
    offers = place.provider.offers(["l40s"], (1,), "secure", 2, True)
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    place.provider.rent(job_module.make_order(composed, choice, "loadmaster-g", time.time(), place.fake.url, None, ()))
    (machine,) = place.provider.machines()
    assert (machine.kind, machine.nodes, machine.name) == ("Pods", 2, "loadmaster-g")
    assert machine.usd_per_hour == pytest.approx(1.98)
    sweep_pods(place.console, True, everything=True, provider=place.provider)
    assert nothing_left(place.fake)


# ------------------------------------------------------------ a real world of processes

WORLD = """
import json, os, pathlib, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sum {total.item()}\\n", end="", flush=True)
if dist.get_rank() == 0:
    run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
    (run / "result.json").write_text(json.dumps({"sum": total.item()}))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_nodes_of_a_cluster_form_one_gloo_world(place, monkeypatch):
    """The torchrun wrapper that travels, the cluster's own variables, static rendezvous, two processes a node."""
    script = place.folder / "world.py"
    script.write_text(WORLD)
    cut = real("train", _on_two_nodes(), "{folder}", "{run_dir}").index("-m")

    def command(stop, choice, folder, run_dir):
        wrapper = real(stop, choice, folder, run_dir)[:cut]
        return [sys.executable, *wrapper[1:], str(script), run_dir]

    monkeypatch.setattr(order, "command", command)
    place.runner.environment = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    assert place.launch("launch.nodes=2", "launch.gpus=['h100_80gb:2']") == 0
    (run,) = (place.folder / "runs" / "qlora_8b").iterdir()
    assert json.loads((run / "result.json").read_text()) == {"sum": 10.0}
    text = log_of(place)
    missing = [rank for rank in range(4) if f"rank {rank} of 4 sum 10.0" not in text]
    assert missing == [], text
    assert "[1] rank 2 of 4" in text


def _on_two_nodes():
    from types import SimpleNamespace

    return SimpleNamespace(offer=SimpleNamespace(nodes=2))
