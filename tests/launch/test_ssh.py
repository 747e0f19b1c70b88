"""`launch=ssh` over a real OpenSSH server on loopback: the hosts are this machine, under two names."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.launch import ssh
from loadmaster.launch.job import launch_job
from loadmaster.launch.record import copied_by, where
from loadmaster.preflight import make_plan
from tests.launch.place import SECRET, STAND_IN, everything_written, press, wait_until, when
from tests.launch.sshd import Sshd

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["launch=ssh", "hardware=cpu", f"launch.python={sys.executable}"]


class Hosts:
    def __init__(self, folder: Path, sshd: Sshd):
        self.folder, self.sshd = folder, sshd
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=200)
        self.room = folder / "room"
        self.progress_s = 0.05

    def launch(self, *words: str) -> int:
        recipe = [] if "recipe=smoke" in words else ["recipe=qlora_8b"]
        there = [f"launch.ssh_config={self.sshd.config}", f"launch.folder='{self.room}'"]
        return launch_job(compose([*recipe, *WORDS, *there, *words]), self.console)

    @property
    def said(self) -> str:
        return self.text.getvalue()

    @property
    def log(self) -> str:
        (log,) = (self.folder / "runs").rglob("node.log")
        return log.read_text()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("ssh") / "server") as running:
        yield running


@pytest.fixture
def hosts(tmp_path, monkeypatch, sshd):
    """The job on the hosts is the stand-in."""
    monkeypatch.chdir(tmp_path)
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    real, made = ssh._job, Hosts(tmp_path, sshd)

    def with_stand_in(*arguments):
        job = real(*arguments)
        return job | {"command": [job["command"][0], str(stand_in), job["run_dir"]], "progress_s": made.progress_s}

    monkeypatch.setattr(ssh, "_job", with_stand_in)
    monkeypatch.setattr(ssh, "POLL_S", 0.05)
    return made


def running(folder: Path) -> list[str]:
    """Processes that were started with a file in `folder` on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder / "stand_in.py") in command:
            found.append(command)
    return found


def test_a_job_runs_on_two_hosts_and_its_files_come_back(hosts, monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    two = "launch.hosts=[node0,node1]"
    assert hosts.launch(two, "launch.secrets.HF_TOKEN=MY_SECRET") == 0
    (run,) = (hosts.folder / "runs" / "qlora_8b").iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 3
    assert "[0] token is [HF_TOKEN]" in hosts.log and "[1] token is [HF_TOKEN]" in hosts.log
    assert hosts.said.count("step 3 of 6, loss 1.5000") == 1 and "$" not in hosts.said.split("started on")[1]
    assert "its run directory is node0:" in hosts.said
    assert copied_by(where(run), run).startswith(f"scp -r -F {hosts.sshd.config} node0:{hosts.room}/runs/")
    assert SECRET not in hosts.said + everything_written(hosts.folder) + everything_written(hosts.room.parent)
    assert running(hosts.folder) == []


def test_the_last_step_is_shown_however_soon_the_job_ends_after_it(hosts):
    hosts.progress_s = 60
    assert hosts.launch("launch.hosts=[node0]", "launch.env.STAND_IN_S='0'") == 0
    assert hosts.said.count("step 3 of 6, loss 1.5000") == 1


def test_one_host_needs_no_meeting_and_a_port_can_be_given(hosts):
    from getpass import getuser

    assert hosts.launch(f"launch.hosts=['{getuser()}@127.0.0.1:{hosts.sshd.port}']") == 0
    assert "node 0 of" not in hosts.log


def test_interpreter_and_run_directory_may_be_named_from_the_home_folder_there(hosts):
    from getpass import getuser

    home = os.path.expanduser(f"~{getuser()}")
    python, run = (os.path.relpath(path, home) for path in (sys.executable, hosts.folder / "own"))
    assert hosts.launch("launch.hosts=[node0]", f"launch.python=~/{python}", f"run_dir=~/{run}") == 0
    (home_again,) = (hosts.folder / "runs").rglob("result.json")
    assert home_again.read_bytes() == (hosts.folder / "own" / "result.json").read_bytes()


def test_the_jobs_exit_code_is_the_launchers_and_the_same_job_goes_on_in_the_same_folder(hosts):
    assert hosts.launch("launch.hosts=[node0]", "launch.env.STAND_IN_CODE='75'") == 75
    assert hosts.launch("launch.hosts=[node0]") == 0
    (run,) = (hosts.room / "runs").iterdir()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_when_one_host_fails_the_others_are_told_to_end(hosts):
    words = ["launch.env.STAND_IN_S_0='60'", "launch.env.STAND_IN_S_1='0.3'", "launch.env.STAND_IN_CODE_1='7'"]
    assert hosts.launch("launch.hosts=[node0,node1]", *words) == 7
    assert "[1] ended with exit code 7" in hosts.said and running(hosts.folder) == []


@pytest.mark.slow
def test_a_host_that_is_deaf_is_killed_after_its_grace(hosts, monkeypatch):
    monkeypatch.setattr(ssh, "NODE_GRACE_S", 0.5)
    words = ["launch.env.STAND_IN_S_0='60'", "launch.env.STAND_IN_DEAF_0='1'", "launch.env.STAND_IN_CODE_1='7'"]
    assert hosts.launch("launch.hosts=[node0,node1]", "launch.env.STAND_IN_S_1='0.5'", *words) == 7
    wait_until(lambda: running(hosts.folder) == [])


def test_ctrl_c_asks_the_job_to_end_and_waits_for_it(hosts):
    when(lambda: "token is" in hosts.said, press)
    assert hosts.launch("launch.hosts=[node0,node1]", "launch.env.STAND_IN_S='60'") == 143
    assert "asked the job to save a checkpoint" in hosts.said and running(hosts.folder) == []


def test_max_hours_asks_the_job_to_end(hosts):
    assert hosts.launch("launch.hosts=[node0]", "launch.env.STAND_IN_S='60'", "launch.max_hours=0.0003") == 143
    assert "are over (launch.max_hours)" in hosts.said and running(hosts.folder) == []


def test_when_the_connection_breaks_the_job_there_ends_by_itself(hosts):
    def cut():
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ssh\0") and str(hosts.sshd.config).encode() in command:
                os.kill(int(process.name), signal.SIGKILL)

    when(lambda: "token is" in hosts.said, cut)
    with pytest.raises(LoadmasterError, match="was lost before the job had ended"):
        hosts.launch("launch.hosts=[node0]", "launch.env.STAND_IN_S='60'")
    wait_until(lambda: running(hosts.folder) == [])


def test_nothing_of_the_job_is_on_a_command_line(hosts, monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    started = []
    popen = ssh.subprocess.Popen
    monkeypatch.setattr(
        ssh.subprocess, "Popen", lambda command, **how: started.append(command) or popen(command, **how)
    )
    assert hosts.launch("launch.hosts=[node0]", "launch.secrets.HF_TOKEN=MY_SECRET", "launch.env.A='x y; rm'") == 0
    assert started and all(command[0] == "ssh" for command in started)
    assert all(SECRET not in word and "rm" not in word.split() for command in started for word in command)
    assert all("LOADMASTER" not in word for command in started for word in command)


def test_data_travels_whatever_its_size_and_a_folder_with_spaces_is_one_word(hosts, tmp_path):
    data = tmp_path / "my data.jsonl"
    row = {"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]}
    data.write_text("".join(json.dumps(row | {"n": os.urandom(300).hex()}) + "\n" for _ in range(400)))
    hosts.room = tmp_path / "a [new] room"
    assert hosts.launch("launch.hosts=[node0]", "data=file", f"data.path='{data}'") == 0
    assert len(list((hosts.folder / "runs").rglob("result.json"))) == 1
    (arrived,) = (hosts.room / "jobs").glob("*/data/*")
    assert arrived.read_bytes() == data.read_bytes()


def test_a_model_that_only_the_hosts_have_is_planned_from_its_config_there(hosts, monkeypatch, tiny):
    words = ["launch.hosts=[node0,node1]", "model.path=/only/there", "model.name=org/tiny", "method=lora"]
    assert hosts.launch(*words, "launch.dry_run=true") == 0
    assert "no plan: /only/there is not here" in hosts.said
    with pytest.raises(ConfigError, match=r"has no config\.json in it on node0, node1"):
        hosts.launch(*words)
    has = f'import os\nif os.environ["LOADMASTER_MODEL"]: os.environ["LOADMASTER_MODEL"] = {str(tiny)!r}\n'
    monkeypatch.setattr(ssh, "PROBE", has + ssh.PROBE)
    assert hosts.launch(*words) == 0
    assert "org/tiny" in hosts.said and "CPU processes" in hosts.said
    (there,) = {path.read_text() for path in hosts.room.rglob("job.yaml")}
    assert "path: /only/there" in there


def test_a_config_that_cannot_be_planned_is_named_as_it_is_on_the_hosts():
    words = ["recipe=qlora_8b", *WORDS, "launch.hosts=[node0]", "model.path=/only/there"]
    said = pytest.raises(ConfigError, match=r"/only/there/config\.json'(.|\n)*cannot be read")
    with said, ssh.with_config(compose(words).job, "{") as known:
        make_plan(known)


@pytest.mark.slow
def test_two_hosts_train_one_model(tmp_path, monkeypatch, sshd, few_words):
    """The real job on both: torchrun wrapper, static rendezvous at what ssh resolves the first host to, gloo."""
    monkeypatch.chdir(tmp_path)
    hosts = Hosts(tmp_path, sshd)
    words = ["recipe=smoke", f"model.path={few_words}", "max_steps=2", "stop_after=train", "sequence_length=256"]
    words += ["batch.global_size=2", "data.max_rows=40", "launch.hosts=[node0,node1]"]
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ROOT}
    assert hosts.launch(*words, *(f"launch.env.{name}='{value}'" for name, value in env.items())) == 0
    assert "on 2 CPU processes" in hosts.said and "of 2, loss" in hosts.said, hosts.said
    assert "[1] ended with exit code 0" in hosts.said and "Traceback" not in hosts.log
    (run,) = (tmp_path / "runs" / "smoke").iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert json.loads((run / "plan.json").read_text())["hardware"]["nodes"] == 2


# ------------------------------------------------------------ what is refused before anything starts


def test_another_version_there_is_refused_with_what_would_work(hosts, monkeypatch):
    monkeypatch.setattr(ssh, "__version__", "9.9.9")
    with pytest.raises(LoadmasterError, match=r"loadmaster here is 9\.9\.9, and node0 has loadmaster 0\.1\.0"):
        hosts.launch("launch.hosts=[node0]")
    assert not (hosts.room / "runs").exists()


def test_an_interpreter_that_is_not_there_is_said(hosts):
    with pytest.raises(LoadmasterError, match=r"node0: .*no-such-python"):
        hosts.launch("launch.hosts=[node0]", "launch.python=no-such-python")


def test_a_host_that_does_not_know_us_is_said_without_asking_for_a_password(hosts):
    with pytest.raises(LoadmasterError, match=r"(?s)Permission denied.*must work by itself"):
        hosts.launch(f"launch.hosts=['nobody@127.0.0.1:{hosts.sshd.port}']")


def test_a_host_of_unknown_key_is_not_trusted(hosts):
    known = hosts.sshd.folder / "known"
    before = known.read_text()
    known.write_text("")
    try:
        with pytest.raises(LoadmasterError, match="Host key verification failed"):
            hosts.launch("launch.hosts=[node0]")
    finally:
        known.write_text(before)


def test_hosts_that_do_not_share_the_folder_are_refused(hosts, monkeypatch):
    """The second host looks elsewhere, as one does whose file system is its own."""
    probe = ssh.PROBE
    elsewhere = probe.replace("base = os", 'os.environ["LOADMASTER_FOLDER"] += os.environ["NODE_RANK"]\nbase = os')
    assert elsewhere != probe
    monkeypatch.setattr(ssh, "PROBE", elsewhere)
    with pytest.raises(LoadmasterError, match="node1 does not see the folder"):
        hosts.launch("launch.hosts=[node0,node1]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "names no host"),
        (["launch.hosts=['-oProxyCommand=x']"], "is no host"),
        (["launch.hosts=['a b']"], "is no host"),
        (["launch.hosts=['u@h:99999']", "launch.dry_run=true"], "ports go from 1 to 65535"),
        (["launch.hosts=['u@h:0']"], "ports go from 1 to 65535"),
        (["launch.hosts=[node0,node0]"], "names a host twice"),
        (["launch.hosts=[node0,node1]", "launch.nodes=3"], "launch.hosts names 2"),
        (["launch.hosts=[node0]", "launch.ssh_config=nope", "launch.dry_run=true"], "is no file"),
        (["launch.hosts=[node0]", "launch.max_usd=3"], "has no effect with launch=ssh"),
        (["launch.hosts=[node0]", "launch.secrets.HF_TOKEN=NOT_SET_HERE"], "is not set in the environment here"),
        (["launch.hosts=[node0]", "launch.env.HF_TOKEN=abc"], r"launch\.secrets\.HF_TOKEN=HF_TOKEN"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_host_is_asked(hosts, monkeypatch, words, said):
    monkeypatch.setattr(ssh, "_probe", None)
    with pytest.raises(ConfigError, match=said):
        hosts.launch(*words)


def test_a_dry_run_prints_the_commands_and_asks_no_host(hosts, monkeypatch):
    monkeypatch.setattr(ssh, "_probe", None)
    assert hosts.launch("launch.hosts=[node0,node1]", "launch.dry_run=true") == 0
    shown = json.loads(hosts.said[hosts.said.index("[\n") :])
    assert [node["command"].split(" -- ")[1].split()[0] for node in shown] == ["node0", "node1"]
    assert shown[1]["stdin"]["ends"] == "with-input"
    assert hosts.launch("launch.hosts=[node0]", "launch.dry_run=true", "launch.secrets.HF_TOKEN=NOT_SET_HERE") == 0
    assert "launch.secrets: NOT_SET_HERE must be in the environment here when it is started" in hosts.said


def test_the_job_of_a_node_meets_the_others_at_the_first_host(hosts, monkeypatch):
    monkeypatch.undo()
    from loadmaster.config.schema import HardwareConfig
    from loadmaster.launch.context import Launch
    from loadmaster.training.stop import StopSignal

    composed = compose(["recipe=qlora_8b", *WORDS, "launch.hosts=[a,b]"])
    launch = Launch(composed, hosts.console, "loadmaster-x", hosts.folder, StopSignal())
    made = ssh._job(launch, ssh.Meeting("/base", "10.0.0.1", "4000"), 1, HardwareConfig("h100_80gb", 8, 2))
    assert made["command"][:7] == [
        sys.executable, "/base/jobs/loadmaster-x/torchrun.py", "--nnodes=2", "--node-rank=1", "--nproc-per-node=8",
        "--master-addr=10.0.0.1", "--master-port=4000",
    ]
    assert made["command"][7:10] == ["-m", "loadmaster.cli", "bundle"]


def test_ssh_is_given_a_configuration_in_the_home_folder_in_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert "/home/someone/.ssh/gpus" in ssh.Host("gpu1", "~/.ssh/gpus").ssh
