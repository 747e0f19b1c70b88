"""`launch=runpod` against the fake provider: Pods are real processes that run the real bootstrap.

The job inside is a stand-in (a few lines of Python), but for one test that runs the real plan stage.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from loadmaster import catalog
from loadmaster.errors import ConfigError, DoesNotFit, LoadmasterError, ProviderError, StoppedOnRequest
from loadmaster.launch import job as job_module
from loadmaster.launch import order, rented
from loadmaster.launch.board import log_file
from loadmaster.launch.job import launch_job
from loadmaster.launch.machines import list_pods, sweep_pods
from tests.launch.fake_runpod import FAULTS, FakeRunpod
from tests.launch.place import SECRET, everything_written, press, wait_until, when

ROOT = Path(__file__).resolve().parents[2]
real = order.command


def test_a_job_goes_out_comes_back_and_the_pod_is_terminated(place):
    code = place.launch("launch.secrets.HF_TOKEN=hf", "launch.env.STAND_IN_S='0.4'")
    assert code == 0
    assert place.fake.pods == {} and [kind for kind, _ in place.fake.created] == ["volume", "pod"]
    (run,) = (place.folder / "runs" / "qlora_8b").iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 3
    assert "step 3 of 6, loss 1.5000, 1,200 tokens/s" in place.said
    assert "token is [HF_TOKEN]" in (run / "pod.log").read_text()
    record = json.loads((run / "launch.json").read_text())
    assert record["count"] == 1 and record["id"].startswith("pod")
    pod = place.fake.bodies[-1]
    assert pod["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}"
    assert pod["mounts"] == {"network": [{"volumeId": next(iter(place.fake.volumes)), "path": "/workspace"}]}
    assert isinstance(pod["args"], str)


def test_the_real_job_composes_and_plans_on_the_pod(place, monkeypatch):
    """The configuration that travelled is the one that was composed here: the plan there is the plan here."""

    def plan_only(stop, choice, folder, run_dir):
        return [sys.executable, *real("plan", choice, folder, run_dir)[1:]]

    monkeypatch.setattr(order, "command", plan_only)
    place.runner.environment = {"PYTHONPATH": str(ROOT)}
    assert place.launch("launch.gpus=['h100_80gb:1']", "lora.rank=8") == 0
    (run,) = (place.folder / "runs" / "qlora_8b").iterdir()
    there = json.loads((run / "plan.json").read_text())
    assert there["fits"] and there["hardware"]["gpu"] == "h100_80gb"
    assert yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank"] == 8


def test_the_cheapest_machine_that_fits_is_taken_and_the_volume_is_used_again(place):
    place.launch()
    first = place.fake.bodies[-1]
    assert first["gpu"]["id"] == "NVIDIA GeForce RTX 4090"
    place.launch("launch.gpus=[h100_80gb]")
    second = place.fake.bodies[-1]
    assert second["gpu"]["id"] != first["gpu"]["id"]
    assert second["mounts"] == first["mounts"]
    assert [kind for kind, _ in place.fake.created] == ["volume", "pod", "pod"]


def test_the_jobs_exit_code_is_the_launchers(place):
    assert place.launch("launch.env.STAND_IN_CODE='5'") == 5
    assert place.fake.pods == {}


def test_no_secret_and_no_key_in_any_file_log_or_request(place):
    place.launch("launch.secrets.HF_TOKEN=hf")
    place.launch("launch.secrets.HF_TOKEN=hf")
    text = place.said + everything_written(place.folder) + json.dumps(place.fake.bodies) + json.dumps(place.fake.logs)
    assert SECRET not in text and place.fake.key not in text and "podkey_" not in text


def test_a_log_that_breaks_again_and_again_loses_nothing(place):
    place.fake.drop_log_after = 4
    assert place.launch("launch.env.STAND_IN_S='1.2'") == 0
    assert place.fake.calls.count(next(c for c in place.fake.calls if c.endswith("/logs"))) > 1
    (run,) = (place.folder / "runs" / "qlora_8b").iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 3
    lines = (run / "pod.log").read_text().splitlines()
    assert sum("token is" in line for line in lines) == 1


def scripted(fake: FakeRunpod, id: str) -> None:
    """What a Pod says, without a process: quick enough for the many launches below."""
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w:gz").close()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    for event in (
        {"event": "armed", "deadline": 0},
        {"event": "file", "part": 0, "data": base64.b64encode(buffer.getvalue()).decode()},
        {"event": "end", "exit_code": 0, "parts": 1, "sha256": digest},
    ):
        fake.say(id, f"::loadmaster {json.dumps(event)}")


@pytest.mark.slow
def test_every_fault_at_every_call_leaves_nothing_running_and_makes_nothing_twice(place, monkeypatch):
    """Each call of a whole launch fails once, in each of five ways; retries carry the launch through."""
    chosen, choose = {}, job_module.choices

    def choices(job, offers, tokens):
        """Of one job, which is planned once on each list of offers."""
        if repr(offers) not in chosen:
            chosen[repr(offers)] = choose(job, offers, tokens)
        return list(chosen[repr(offers)])

    monkeypatch.setattr(job_module, "choices", choices)
    fake = place.fake
    fake.runner = scripted
    composed = place.composed()
    launch_job(composed, place.console, place.provider, tokens=200_000)
    calls = len(fake.calls)
    assert calls >= 8
    for kind in FAULTS:
        for call in range(1, calls + 1):
            fake.calls.clear()
            fake.created.clear()
            fake.volumes.clear()
            fake.faults = {call: kind}
            assert launch_job(composed, place.console, place.provider, tokens=200_000) == 0, (kind, call)
            assert fake.pods == {}, (kind, call)
            assert sorted(thing for thing, _ in fake.created) == ["pod", "volume"], (kind, call)
    assert fake.key not in place.said + everything_written(place.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timeout", "lost"])
def test_when_the_provider_fails_for_good_the_pod_ends_itself(place, kind, monkeypatch):
    """From the first log call on nothing answers any more: the machine must not depend on the launcher."""
    place.launch()
    made = job_module.make_order

    def soon(*arguments):
        ordered = made(*arguments)
        job = json.loads(ordered.env["LOADMASTER_JOB"]) | {"hold_s": 0.3}
        return replace(ordered, env={**ordered.env, "LOADMASTER_JOB": json.dumps(job)})

    monkeypatch.setattr(job_module, "make_order", soon)
    first = place.fake.calls.index(next(call for call in place.fake.calls if call.endswith("/logs"))) + 1
    place.fake.calls.clear()
    place.fake.volumes.clear()
    place.fake.faults = dict.fromkeys(range(first, first + 50_000), kind)
    with pytest.raises(LoadmasterError, match=r"are over|is gone"):
        place.launch("launch.env.STAND_IN_S='30'", "launch.env.STAND_IN_DEAF='1'", "launch.max_hours=0.001")
    assert "ATTENTION" in place.said
    wait_until(lambda: place.fake.pods == {})


@pytest.mark.parametrize("kind", ["500", "429"])
def test_an_hour_without_an_answer_ends_no_job(place, kind):
    """A network that is gone, a provider that is down: the job is followed again when there is an answer."""
    place.launch()
    first = place.fake.calls.index(next(call for call in place.fake.calls if call.endswith("/logs"))) + 1
    place.fake.calls.clear()
    place.fake.volumes.clear()
    place.fake.faults = dict.fromkeys(range(first, first + 30), kind)
    spoken = place.folder / "spoken"
    when(lambda: len(place.fake.calls) > first + 30, spoken.touch)
    assert place.launch(f"launch.env.STAND_IN_UNTIL={spoken}") == 0, place.said
    assert place.said.count("is followed again once there is an answer") == 1
    assert place.fake.pods == {}


def test_a_provider_that_is_silent_is_no_machine_that_does_not_start(place, monkeypatch):
    to_the_end = rented._Followed.to_the_end

    def silent_for_a_while(followed):
        now = len(place.fake.calls)
        place.fake.faults = dict.fromkeys(range(now, now + 100_000), "500")

        def speak():
            place.fake.faults = {}
            (place.folder / "spoken").touch()

        threading.Timer(1.5, speak).start()
        return to_the_end(followed)

    monkeypatch.setattr(rented, "START_S", 1.0)
    monkeypatch.setattr(rented._Followed, "to_the_end", silent_for_a_while)
    assert place.launch(f"launch.env.STAND_IN_UNTIL={place.folder / 'spoken'}") == 0, place.said
    assert "has not started the job" not in place.said


def test_a_disk_that_is_full_here_ends_no_job_there(place, monkeypatch):
    monkeypatch.setattr(rented, "log_file", lambda path: log_file(Path("/dev/full")))
    assert place.launch() == 0, place.said
    assert place.said.count("the log is kept no longer") == 1


def test_a_volume_that_is_too_small_is_refused_before_anything_is_rented(place):
    place.launch()
    (volume,) = place.fake.volumes.values()
    volume["size"] = 11
    place.fake.calls.clear()
    with pytest.raises(LoadmasterError, match=r"has 11 GB, and this run needs \d+ GB(.|\n)*launch\.volume_gb=11"):
        place.launch()
    assert not any(call.startswith("POST") for call in place.fake.calls)
    assert place.launch("launch.volume_gb=11") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_terminate_and_the_checkpoints_stay_on_the_volume(number, place):
    when(lambda: place.fake.logs, lambda: press(number))
    with pytest.raises(StoppedOnRequest, match="on the volume"):
        place.launch("launch.env.STAND_IN_S='30'")
    assert place.fake.pods == {} and len(place.fake.volumes) == 1


def test_the_job_is_told_to_save_a_checkpoint_before_the_limit(place):
    """SIGTERM: the real job saves and exits with 75, the stand-in just ends (128 + 15)."""
    assert place.launch("launch.env.STAND_IN_S='30'", "launch.max_hours=0.001") == 143
    assert place.fake.pods == {}


@pytest.mark.parametrize("limit", ["launch.max_hours=0.0005", "launch.max_usd=0.00035"])
def test_the_limits_terminate_a_job_that_does_not_listen(place, limit):
    words = ["launch.env.STAND_IN_S='30'", "launch.env.STAND_IN_DEAF='1'", "launch.gpus=[rtx4090:1]"]
    with pytest.raises(LoadmasterError, match=r"are over|is gone"):  # by the launcher's clock, or the machine's own
        launch_job(place.composed(*words, limit), place.console, place.provider, tokens=None)
    assert place.fake.pods == {}


def test_a_pod_that_nobody_watches_ends_itself_at_its_deadline(place):
    """The launcher is gone from the start: the order is sent, and then nothing more is asked."""
    composed = place.composed("launch.env.STAND_IN_S='30'", "launch.max_hours=0.0004")
    offers = place.provider.offers(["l40s"], (1,), "secure")
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    ordered = job_module.make_order(
        composed, choice, "loadmaster-alone", time.time(), place.fake.url, None, choice.offer.places
    )
    place.provider.rent(ordered)
    assert len(place.fake.pods) == 1
    wait_until(lambda: place.fake.pods == {})
    assert [call for call in place.fake.calls if call.startswith("DELETE")] == []


def test_a_pod_that_dies_is_an_error_with_its_log_saved(place):
    when(lambda: "token is" in place.said, lambda: place.fake.end_pod(next(iter(place.fake.pods))))
    with pytest.raises(ProviderError, match="is gone"):
        place.launch("launch.env.STAND_IN_S='30'")
    (log,) = (place.folder / "runs").rglob("pod.log")
    assert "token is None" in log.read_text()


def test_no_stock_tries_the_next_place_and_takes_the_volume_back(place, monkeypatch):
    tried = []
    create = place.fake.createPod

    def only_in_texas(ids, query, body):
        tried.append(body["dataCenterIds"])
        if body["dataCenterIds"] != ["US-TX-3"]:
            place.fake.sold_out.add(body["gpu"]["id"])
        try:
            return create(ids, query, body)
        finally:
            place.fake.sold_out.clear()

    monkeypatch.setattr(place.fake, "createPod", only_in_texas)
    assert place.launch() == 0
    assert tried == [["EU-RO-1"], ["US-TX-3"]]
    assert [volume["dataCenter"] for volume in place.fake.volumes.values()] == ["US-TX-3"]


def test_nothing_to_be_had_says_so_and_leaves_nothing(place, monkeypatch):
    create = place.fake.createPod

    def none_left(ids, query, body):
        place.fake.sold_out.add(body["gpu"]["id"])
        return create(ids, query, body)

    monkeypatch.setattr(place.fake, "createPod", none_left)
    with pytest.raises(ProviderError, match="could not be rented"):
        place.launch()
    assert place.fake.pods == {} and place.fake.volumes == {}


def test_a_dry_run_prints_requests_that_the_provider_would_take_and_makes_nothing(place):
    from tests.launch import openapi

    assert place.launch("launch.dry_run=true") == 0
    assert place.fake.created == [] and not any(call.startswith("POST") for call in place.fake.calls)
    requests = json.loads(place.said[place.said.index("\n[\n") :])
    for request, operation in zip(requests, ("createNetworkVolume", "createPod"), strict=True):
        schema = openapi.DESCRIPTION["operations"][operation]["request"]
        assert openapi.errors(schema, request["body"]) == []
        assert request["url"].startswith(place.fake.url)


def test_without_a_key_a_dry_run_takes_the_catalogue_and_says_so(place, monkeypatch):
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("RUNPOD_API_BASE_URL_V2", "http://127.0.0.1:9/v2")  # nobody is there to be asked

    def dry(*words):
        return launch_job(place.composed("launch.dry_run=true", *words), place.console, tokens=200_000)

    assert dry("launch.gpus=[l40s:1]") == 0
    assert "RUNPOD_API_KEY is not set, so stock, prices and volumes were not asked" in place.said
    listed = catalog.prices()["gpus"]["l40s"]["pod_usd_per_hour"]
    of_others = f"${listed:.2f}/h on community hosts, secure costs more"  # of secure ones no price is known
    assert f"> 1x l40s        {of_others}, " in place.said and f", {of_others}\n" in place.said
    assert re.search(r"  cost at least \$\S+; terminated after \S+ h at the latest, \$\S+ or more\n", place.said)
    volume, pod = json.loads(place.said[place.said.index("\n[\n") :])
    assert volume["url"] == "http://127.0.0.1:9/v2/network-volumes" and "in stock>" in volume["body"]["dataCenter"]
    assert pod["body"]["gpu"]["id"] == catalog.gpus()["l40s"]["name"]
    assert "ended before it is done" not in place.said
    assert dry("launch.gpus=[l40s:1]", "launch.max_hours=0.05") == 0
    late = r" after 0\.05 h at the latest, \S+ or more\n  by the plan it takes 0\.\d+ h: it is ended before it is done"
    assert re.search(late, place.said)
    with pytest.raises(DoesNotFit, match=r"over launch\.max_usd_per_hour=0\.01"):
        dry("launch.max_usd_per_hour=0.01")
    with pytest.raises(ProviderError, match="RUNPOD_API_KEY is not set"):
        launch_job(place.composed(), place.console, tokens=200_000)


def test_a_dry_run_of_data_for_the_volume_needs_no_key_and_names_the_one_that_renting_needs(place, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    rows = (json.dumps({"text": random.Random(n).randbytes(100).hex()}) + "\n" for n in range(1000))
    (place.folder / "mine.jsonl").write_text("".join(rows))
    words = ("data=file", "data.path=mine.jsonl")
    needed = "it is rented once AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY hold the provider's S3 API key"
    assert place.launch(*words, "launch.dry_run=true") == 0
    assert "  mine.jsonl (0.2 MB) goes to the volume first" in place.said and needed in place.said
    assert "  cost about $" in place.said and '"body"' in place.said and "data/0-mine" not in place.said
    assert place.launch("launch.fetch=true", "launch.dry_run=true") == 0 and place.said.count(needed) == 2
    assert place.launch("launch.dry_run=true") == 0 and place.said.count(needed) == 2
    with pytest.raises(ConfigError, match=r"packs to (.|\n)*fix: set AWS_ACCESS_KEY_ID"):
        place.launch(*words)
    for dry in ("true", "false"):
        with pytest.raises(ConfigError, match=r"fix: leave launch\.volume=null out, and set AWS_ACCESS_KEY_ID"):
            place.launch(*words, "launch.volume=null", f"launch.dry_run={dry}")


def test_a_gated_model_without_a_token_for_it_is_told_before_anything_is_rented(place):
    said = "meta-llama/Llama-3.1-8B-Instruct is gated on the Hub: without launch.secrets.HF_TOKEN=NAME"
    assert place.launch("launch.dry_run=true") == 0 and place.said.count(said) == 1
    assert place.launch("launch.dry_run=true", "launch.secrets.HF_TOKEN=hf") == 0
    assert place.launch("launch.dry_run=true", "model.name=Qwen/Qwen3-8B") == 0
    assert place.said.count("is gated") == 1


def test_without_a_yes_nothing_is_rented(place, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(LoadmasterError, match=r"launch\.yes=true"):
        place.launch("launch.yes=false")
    assert place.fake.created == []


def test_a_volume_goes_by_its_id_where_two_have_one_name(place):
    place.launch()
    (first,) = place.fake.volumes
    place.fake.volumes["twin"] = {**place.fake.volumes[first], "id": "twin"}
    with pytest.raises(LoadmasterError, match=r"several network volumes are called loadmaster: vol0001(.|\n)*twin"):
        place.launch("seed=2")
    assert place.launch("seed=2", "launch.volume=twin") == 0
    assert place.fake.bodies[-1]["mounts"]["network"][0]["volumeId"] == "twin"
    assert [kind for kind, _ in place.fake.created] == ["volume", "pod", "pod"]


def test_limits_that_no_machine_meets_are_explained(place):
    with pytest.raises(DoesNotFit, match=r"over launch\.max_usd_per_hour=0\.1"):
        place.launch("launch.max_usd_per_hour=0.1")
    with pytest.raises(DoesNotFit, match=r"over launch\.max_usd=0\.001"):
        place.launch("launch.max_usd=0.001")


def test_what_cannot_be_launched_is_refused_before_the_provider_is_asked(place):
    with pytest.raises(ConfigError) as refused:
        place.launch("launch.force_pods=true", "launch.image=a/b:latest", "launch.env.MY_TOKEN=x", "stop_after=plan")
    keys = {problem.key for problem in refused.value.problems}
    assert keys == {"launch.force_pods", "launch.max_hours", "launch.image", "launch.env.MY_TOKEN", "stop_after"}
    assert place.fake.calls == []


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"version": "9.9.9"}, 2, "the launcher 9.9.9"),
        ({"folder": "/proc/no"}, 4, "the bootstrap failed"),
        ({"package": "no-such-package-of-loadmaster @ file:///nowhere.whl"}, 2, "pip could not install"),
    ],
)
def test_a_pod_that_cannot_start_the_job_says_why_and_is_terminated(place, monkeypatch, change, code, said):
    made = job_module.make_order

    def broken(*arguments):
        ordered = made(*arguments)
        job = json.loads(ordered.env["LOADMASTER_JOB"]) | change
        return replace(ordered, env={**ordered.env, "LOADMASTER_JOB": json.dumps(job)})

    monkeypatch.setattr(job_module, "make_order", broken)
    assert place.launch() == code
    assert said in place.said and place.fake.pods == {}


def test_pods_are_listed_with_age_cost_and_end_and_orphans_swept(place):
    place.fake.runner = None
    composed = place.composed()
    offers = place.provider.offers(["l40s"], (1,), "secure")
    choice = job_module.choices(composed.job, offers, 200_000)[0]
    for name, start in (("loadmaster-young", time.time()), ("loadmaster-old", time.time() - 90_000)):
        place.provider.rent(job_module.make_order(composed, choice, name, start, place.fake.url, None, ()))
    assert list_pods(place.console, place.provider) == 0
    assert "loadmaster-young" in place.said and "past its deadline" in place.said and "0.99" in place.said
    assert sweep_pods(place.console, True, provider=place.provider) == 0
    assert [pod["name"] for pod in place.fake.pods.values()] == ["loadmaster-young"]
    assert sweep_pods(place.console, True, everything=True, provider=place.provider) == 0
    assert place.fake.pods == {}


@pytest.mark.slow
def test_the_commands_of_a_person(place):
    """train.py and loadmaster pods as processes, the key and the address from the environment."""
    env = {**os.environ, "RUNPOD_API_KEY": place.fake.key, "RUNPOD_API_BASE_URL_V2": place.fake.url, "COLUMNS": "200"}

    def run(*words, **more):
        return subprocess.run(words, cwd=place.folder, env=env | more, capture_output=True, text=True, timeout=60)

    train = [sys.executable, str(ROOT / "train.py"), "recipe=qlora_8b", "launch=runpod", "launch.image=me/image:1"]
    dry = run(*train, "launch.dry_run=true")
    assert dry.returncode == 0 and '"url": "http://127.0.0.1' in dry.stdout, dry.stderr
    asked = run(*train)
    assert asked.returncode == 4 and "launch.yes=true" in asked.stderr
    assert place.fake.created == []
    keyless = run(*train, RUNPOD_API_KEY="")
    assert keyless.returncode == 4 and "RUNPOD_API_KEY is not set" in keyless.stderr
    place.runner.environment = {"PYTHONPATH": str(ROOT)}
    rented = run(*train, "launch.yes=true")
    # The real job starts on the Pod, plans, and finds no card of that name here: its exit code is the launcher's.
    assert "| plan: done" in rented.stdout and f"exit code {rented.returncode};" in rented.stdout
    assert rented.returncode != 0 and "nothing of it is left running" in rented.stdout
    assert place.fake.pods == {}
    mine = {"id": "vol9", "name": "mine", "size": 100, "dataCenter": "EU-RO-1", "type": "STANDARD"}
    place.fake.volumes["vol9"] = mine  # of a launch.volume=mine
    pods = run(sys.executable, "-m", "loadmaster.cli", "pods", PYTHONPATH=str(ROOT))
    assert pods.returncode == 0 and "no Pods or clusters of loadmaster" in pods.stdout
    assert "volume loadmaster" in pods.stdout
    assert "volume mine (vol9): 100 GB in EU-RO-1, $7.00 a month" in pods.stdout
    sweep = run(sys.executable, "-m", "loadmaster.cli", "pods", "sweep", "--yes", PYTHONPATH=str(ROOT))
    assert sweep.returncode == 0 and "nothing to sweep" in sweep.stdout
    text = "".join(done.stdout + done.stderr for done in (dry, asked, keyless, rented, pods, sweep))
    assert place.fake.key not in text and "Traceback" not in text
