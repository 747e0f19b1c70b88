"""However a launch ends, nothing of it goes on costing: killed, interrupted at any call, swept while calls fail."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess as Done
from urllib.error import HTTPError

import pytest
from rich.console import Console

from loadmaster.config.compose import Composed, compose
from loadmaster.errors import LoadmasterError, ProviderError, StoppedOnRequest
from loadmaster.launch import follow
from loadmaster.launch import job as job_module
from loadmaster.launch.job import PAYLOAD, launch_job
from loadmaster.launch.machines import list_pods, sweep_pods
from loadmaster.launch.payload import packed_files
from tests.launch.fake_runpod import FAULTS, Problem
from tests.launch.place import PACKAGE, everything_written, wait_until
from tests.launch.test_launch_job import scripted
from tests.runs import command
from tests.terminal import OnTerminal

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def composed_once() -> Composed:
    return compose(["recipe=qlora_8b", "launch=runpod", "launch.yes=true", PACKAGE])


def rent(place, *names: str) -> None:
    """Pods with a job that runs, and nobody who follows it."""
    place.fake.runner = None
    composed = composed_once()
    choice = job_module.choices(composed.job, place.provider.offers(["l40s"], (1,), "secure"), 200_000)[0]
    for name in names:
        made = job_module.make_order(composed, choice, name, time.time(), place.fake.url, None, ())
        place.provider.rent(made)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_pod_that_ends_itself(place):
    """SIGKILL: no handler runs, no request is sent. The switch on the machine is all that is left."""
    place.runner.environment = {"PYTHONPATH": str(ROOT)}
    env = {**os.environ, "RUNPOD_API_KEY": place.fake.key, "RUNPOD_API_BASE_URL_V2": place.fake.url}
    command = [
        sys.executable, str(ROOT / "train.py"), "recipe=qlora_8b", "launch=runpod", "launch.image=me/image:1",
        "launch.yes=true", "launch.max_hours=0.005",
    ]
    launcher = subprocess.Popen(command, cwd=place.folder, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: place.fake.pods and any(place.fake.logs.values()), 60)
        launcher.kill()
        assert launcher.wait(60) == -signal.SIGKILL
        wait_until(lambda: place.fake.pods == {}, 60)
    finally:
        launcher.kill()
    assert not any(call.startswith("DELETE") for call in place.fake.calls)  # those of Pods are not counted
    assert [kind for kind, _ in place.fake.deleted] == ["pod"]
    assert list_pods(place.console, place.provider) == 0 and "no Pods or clusters" in place.said


def test_a_launcher_whose_terminal_closes_ends_the_pod(place):
    """What it has to say on the way out finds no terminal."""
    place.runner.environment = {"PYTHONPATH": str(ROOT)}
    words = ["recipe=qlora_8b", "launch=runpod", "launch.image=me/image:1", "launch.yes=true", "launch.max_hours=0.2"]
    account = {"RUNPOD_API_KEY": place.fake.key, "RUNPOD_API_BASE_URL_V2": place.fake.url}
    launcher = OnTerminal(command(*words), place.folder, **account)
    launcher.until(lambda: place.fake.pods and any(place.fake.logs.values()))
    launcher.close()
    assert launcher.code() == 75
    assert place.fake.pods == {} and any(call.startswith("DELETE") for call in place.fake.calls)


def switch() -> dict:
    """What launch/pod_bootstrap.py defines."""
    bootstrap: dict = {}
    exec((ROOT / "launch" / "pod_bootstrap.py").read_text().removesuffix("main()\n"), bootstrap)
    return bootstrap


@pytest.mark.parametrize("ends", ["pod", "cluster"])
def test_a_pod_that_the_provider_does_not_find_goes_on_ending_itself(monkeypatch, ends):
    """The API has moved, or hides it from this key: the Pod is there, as it asks."""
    monkeypatch.setenv("RUNPOD_POD_ID", "pod1")
    bootstrap, ran = switch(), []

    def ask(method, url):
        raise HTTPError(url, 404, "Not Found", {}, None)

    bootstrap["ask"] = ask
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command) or Done(command, 1))
    assert bootstrap["terminate"]({"ends": ends, "api": "http://nowhere"}) is False
    assert ran == [["runpodctl", "remove", "pod", "pod1"]]


def test_a_pod_that_is_still_there_after_its_end_was_promised_asks_again(tmp_path):
    program = """
import os, sys, time
bootstrap = {}
exec(open(sys.argv[1]).read().removesuffix("main()\\n"), bootstrap)
bootstrap["POLL_S"] = 0.02
bootstrap["terminate"] = lambda job: print("asked", os.getpid(), flush=True) or True
bootstrap["arm"]({"deadline": time.time(), "max_hours": 1}, os.getpid())
time.sleep(60)
"""
    words = [sys.executable, "-c", program, str(ROOT / "launch" / "pod_bootstrap.py")]
    pod = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        asked = [pod.stdout.readline().split() for _ in range(3)]
        assert [word for word, _ in asked] == ["asked"] * 3 and len({pid for _, pid in asked}) == 1
    finally:
        pod.kill()
        os.kill(int(asked[0][1]), signal.SIGKILL)


def test_a_machine_hands_back_as_much_as_is_taken_here():
    assert switch()["LARGEST_TOTAL_BYTES"] == follow.MOST_BYTES


def test_a_job_is_told_before_its_end_by_a_clock_that_is_behind_too(tmp_path):
    bootstrap = switch()
    bootstrap["node"] = lambda: 1
    job = {"name": "n", "folder": str(tmp_path), "ends": "pod", "command": ["sleep", "600"]}
    job |= {"deadline": time.time() + 7200, "max_hours": 1 / 3600, "stop_before_s": 0.5}
    began = time.monotonic()
    assert bootstrap["run"](job, str) == 128 + signal.SIGTERM and time.monotonic() - began < 300


def test_a_secret_that_ends_with_a_line_break_or_has_several_lines_is_blacked_out(monkeypatch):
    monkeypatch.setenv("A", "hf_THE0SECRET\n")
    monkeypatch.setenv("B", "{\n  'private': 'MIIEvQIBADANBg'\n}\n")
    monkeypatch.setenv("C", "pin")
    monkeypatch.setenv("D", " \n")
    found = [("'private': 'MIIEvQIBADANBg'", "B"), ("hf_THE0SECRET", "A"), ("pin", "C")]
    assert switch()["hidden"](["A", "B", "C", "D", "NOT_SET"]) == found


@pytest.mark.parametrize(
    ("code", "left_s", "times"), [(0, 3600, 1), (4, 3600, 1), (75, 3600, 2), (75, 300, 1), (75, None, 2)]
)
def test_in_a_container_that_is_started_again_only_a_job_that_was_stopped_before_its_time_goes_on(
    tmp_path, code, left_s, times
):
    bootstrap, runs = switch(), []
    record = tmp_path / "ended-0.json"
    run = lambda job, redact: runs.append(record.exists()) or code  # noqa: E731
    bootstrap |= {"prepare": lambda job, redact: None, "run": run}
    deadline = None if left_s is None else time.time() + left_s
    job = {"folder": str(tmp_path), "deadline": deadline, "stop_before_s": 360}
    assert [bootstrap["once"](job, str) for _ in range(2)] == [(code, None)] * 2
    assert runs == [False] * times  # nor is it said to have ended while it goes on
    assert json.loads(record.read_text()) == [code, None]


@pytest.fixture
def late_fingers():
    """A Ctrl-C that comes when the launch is over is nobody's."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_at_any_call_leaves_nothing_running(place, late_fingers):
    """A finger on Ctrl-C while each call of a whole launch is on its way, and again while the machine is ended."""
    fake = place.fake
    fake.runner = scripted
    composed = place.composed()
    launch_job(composed, place.console, place.provider, tokens=200_000)
    calls = len(fake.calls)
    for at in range(1, calls + 1):
        fake.calls.clear()
        fake.created.clear()
        done = threading.Event()

        def press(at=at, done=done):
            while not done.is_set():
                if len(fake.calls) >= at:
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                time.sleep(0.0005)

        finger = threading.Thread(target=press, daemon=True)
        finger.start()
        with contextlib.suppress(StoppedOnRequest):  # the last calls are those that end the machine: not disturbed
            assert launch_job(composed, place.console, place.provider, tokens=200_000) == 0
        done.set()
        finger.join()
        assert fake.pods == {}, at
        assert len(fake.created) <= 2, (at, fake.created)
    assert "Traceback" not in place.said and fake.key not in place.said + everything_written(place.folder)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_sweep_ends_everything_though_each_of_its_calls_fails_once(place, kind):
    rent(place, "loadmaster-a")
    sweep_pods(place.console, True, everything=True, provider=place.provider)
    calls = len(place.fake.calls)
    for call in range(1, 6):
        place.fake.calls.clear()
        rent(place, "loadmaster-a", "loadmaster-b")
        place.fake.pods["other"] = {**next(iter(place.fake.pods.values())), "id": "other", "name": "somebody-else's"}
        place.fake.calls.clear()
        place.fake.faults = {call: kind}
        assert sweep_pods(place.console, True, everything=True, provider=place.provider) == 0
        assert list(place.fake.pods) == ["other"], (kind, call)
        del place.fake.pods["other"]
        place.fake.faults = {}
    assert calls >= 3


def test_one_that_cannot_be_ended_does_not_keep_the_others_up(place):
    rent(place, "loadmaster-a", "loadmaster-b")
    first = next(iter(place.fake.pods))
    place.fake.named_faults = {("deletePod", number): "500" for number in range(1, 5)}
    with pytest.raises(ProviderError, match=r"not certain to have ended, and may cost money: loadmaster-a"):
        sweep_pods(place.console, True, everything=True, provider=place.provider)
    assert list(place.fake.pods) == [first]


def test_one_is_swept_by_its_name_and_what_is_none_is_said(place):
    rent(place, "loadmaster-a", "loadmaster-b")
    with pytest.raises(LoadmasterError, match=r"no loadmaster-c that loadmaster has made; there is: loadmaster-"):
        sweep_pods(place.console, True, names=["loadmaster-c"], provider=place.provider)
    assert sweep_pods(place.console, True, names=["loadmaster-b"], provider=place.provider) == 0
    assert [pod["name"] for pod in place.fake.pods.values()] == ["loadmaster-a"]


def test_a_sweep_that_nobody_can_agree_to_says_so(place, monkeypatch):
    rent(place, "loadmaster-a")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(LoadmasterError, match="--yes goes on without"):
        sweep_pods(place.console, everything=True, provider=place.provider)
    assert len(place.fake.pods) == 1


def test_the_same_job_twice_at_once_is_refused_and_another_one_is_not(place):
    """Two in one run directory would write each other's checkpoints."""
    place.launch()
    job = json.loads(place.fake.bodies[-1]["env"]["LOADMASTER_JOB"])
    rent(place, "loadmaster-first")
    (running,) = place.fake.pods.values()
    env = json.loads(running["env"]["LOADMASTER_JOB"]) | {"run_dir": job["run_dir"]}
    running["env"] = {**running["env"], "LOADMASTER_JOB": json.dumps(env)}
    before = len(place.fake.created)
    with pytest.raises(LoadmasterError, match=r"runs already(.|\n)*on Pod loadmaster-first(.|\n)*sweep loadmaster-fi"):
        place.launch()
    assert len(place.fake.created) == before
    place.fake.runner = scripted
    assert place.launch("seed=2") == 0
    running["status"] = "EXITED"  # it does not write any more
    assert place.launch() == 0


@pytest.mark.parametrize("answer", ["n", "", "y?", "YES"])
def test_only_a_yes_rents(place, monkeypatch, answer):
    place.fake.runner = scripted
    terminal = io.StringIO(f"{answer}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    if answer == "YES":
        assert place.launch("launch.yes=false") == 0 and place.fake.bodies
    else:
        with pytest.raises(LoadmasterError, match="nothing was rented"):
            place.launch("launch.yes=false")
        assert not place.fake.created


def test_nothing_is_rented_where_the_question_is_answered_with_the_end_of_input(place):
    words = ["recipe=qlora_8b", "launch=runpod", "launch.image=me/image:1"]
    launcher = OnTerminal(
        [sys.executable, str(ROOT / "train.py"), *words], place.folder,
        RUNPOD_API_KEY=place.fake.key, RUNPOD_API_BASE_URL_V2=place.fake.url,
    )
    launcher.until(lambda: "Rent it? [y/N]" in launcher.said)
    os.write(launcher.master, b"\x04")  # Ctrl-D
    assert launcher.code() == 4
    assert "nothing was rented" in launcher.said and "Traceback" not in launcher.said and not place.fake.pods


def test_a_terminal_gets_a_bar_and_keeps_the_lines(place):
    place.console = Console(file=place.text, width=160, force_terminal=True, color_system=None)
    assert place.launch("launch.env.STAND_IN_S='0.4'") == 0
    assert "3/6" in place.said and "loss 1.5000, 1,200 tokens/s; 0.00 h, $" in place.said
    assert "| token is None" in place.said and "step 3 of 6" not in place.said


def test_a_dry_run_on_a_terminal_names_what_is_packed_and_in_a_pipe_prints_it(place):
    (place.folder / "mine.jsonl").write_text('{"text": "some words of mine"}\n')
    words = ("launch.dry_run=true", "launch.package=auto", "data=file", "data.path=mine.jsonl")
    env = {}
    for terminal in (False, True):
        place.text = io.StringIO()
        place.console = Console(file=place.text, width=160, force_terminal=terminal, color_system=None)
        assert place.launch(*words) == 0
        env[terminal] = json.loads(place.said[place.said.index("\n[\n") :])[1]["body"]["env"]
    assert len(env[False]["LOADMASTER_WHEEL_0"]) == 98_304 and "data/0-mine.jsonl" in packed_files(env[False][PAYLOAD])
    env = env[True]
    assert re.fullmatch(r"\S{20}\.\.\. \(98,304 characters, whole in a pipe\)", env["LOADMASTER_WHEEL_0"])
    files = r"constraints\.txt \d\.\d kB, data/0-mine\.jsonl 0\.0 kB, job\.yaml \d\.\d kB"
    assert re.fullmatch(rf"\S{{20}}\.\.\. \([\d,]+ characters, whole in a pipe: {files}\)", env[PAYLOAD])
    assert len(place.said) < 12_000 and json.loads(env["LOADMASTER_JOB"])["package"] is None


def starts_slowly(then):
    """A Pod that speaks, goes on once then(fake, id) is true, and ends well."""

    def runner(fake, id):
        fake.say(id, '::loadmaster {"event": "armed", "deadline": 0}')
        with contextlib.suppress(AssertionError):  # then it ends all the same
            wait_until(lambda: then(fake, id) or id not in fake.pods)
        scripted(fake, id)

    return runner


def test_a_pod_that_a_lost_request_made_later_is_ended_and_not_paid_until_the_end(place):
    def runner(fake, id):
        with fake.lock:
            fake.pods["late"] = {**fake.pods[id], "id": "late", "_end": None}
        starts_slowly(lambda fake, id: "late" not in fake.pods)(fake, id)

    place.fake.runner = runner
    assert place.launch() == 0, place.said
    assert "terminated Pod late: made twice" in place.said and place.fake.pods == {}
    assert place.fake.deleted[0] == ("pod", "late")


def test_a_pod_whose_making_was_interrupted_is_looked_for_until_it_is_there(place, monkeypatch):
    """Ctrl-C while the request is on its way, and the provider carries it out half a minute later."""
    rent(place, "loadmaster-a")
    (pod,) = place.fake.pods.values()
    place.fake.pods, listed, lists = {}, place.fake.listPods, []

    def interrupted(request):
        pod["name"] = request.name
        raise StoppedOnRequest("now")

    def later(ids, query, body):
        lists.append(query)
        if len(lists) == 5:
            place.fake.pods[pod["id"]] = pod
        return listed(ids, query, body)

    monkeypatch.setattr(place.provider.client, "create_pod", interrupted)
    monkeypatch.setattr(place.fake, "listPods", later)
    with pytest.raises(StoppedOnRequest):
        place.launch()
    assert place.fake.pods == {} and len(lists) > 5


def test_of_a_groups_pods_only_those_that_came_late_are_ended(place):
    def runner(fake, id):
        with fake.lock:
            name = fake.pods[id]["name"]
            if name.endswith("-node1"):
                fake.pods = {"late": {**fake.pods[id], "id": "late", "_end": None}, **fake.pods}
        starts_slowly(lambda fake, id: fake.deleted)(fake, id)

    place.fake.runner = runner
    words = ["launch.nodes=2", "launch.force_pods=true", "launch.max_hours=1", "launch.gpus=[l40s:1]"]
    assert place.launch(*words) == 0, place.said
    assert place.fake.deleted[0] == ("pod", "late") and place.fake.pods == {}


@pytest.mark.parametrize("older", [True, False])
def test_of_two_launches_of_one_job_at_the_same_moment_the_younger_gives_way(place, older):
    def runner(fake, id):
        created = "2020-01-01T00:00:00Z" if older else "2099-01-01T00:00:00Z"
        with fake.lock:
            other = {**fake.pods[id], "id": "theirs", "name": "loadmaster-theirs", "createdAt": created, "_end": None}
            fake.pods["theirs"] = other
        starts_slowly(lambda fake, id: not older)(fake, id)

    place.fake.runner = runner
    if older:
        with pytest.raises(ProviderError, match="same run directory on Pod loadmaster-theirs"):
            place.launch()
    else:
        assert place.launch() == 0, place.said
    assert list(place.fake.pods) == ["theirs"]


def test_a_node_that_cannot_be_ended_keeps_no_other_one(place, monkeypatch):
    delete = place.fake.deletePod

    def refuses_the_first(ids, query, body):
        if place.fake.pods[ids["id"]]["name"].endswith("-node0"):
            raise Problem(409, "it is locked")
        return delete(ids, query, body)

    monkeypatch.setattr(place.fake, "deletePod", refuses_the_first)
    place.fake.runner = scripted
    words = ["launch.nodes=2", "launch.force_pods=true", "launch.max_hours=1", "launch.gpus=[l40s:1]"]
    assert place.launch(*words) == 0, place.said
    assert [pod["name"][-6:] for pod in place.fake.pods.values()] == ["-node0"]
    assert "ATTENTION: it is not certain" in place.said and "it is locked" in place.said
