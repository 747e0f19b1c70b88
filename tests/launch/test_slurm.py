"""`launch=slurm` against Slurm's commands as local programs that really run the script; no Slurm here."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError, LoadmasterError, StoppedOnRequest
from loadmaster.launch import job as job_module
from loadmaster.launch import order, slurm
from loadmaster.launch.job import launch_job
from loadmaster.pipeline import run_elsewhere
from tests.launch import fake_slurm
from tests.launch.place import SECRET, everything_written, press, when
from tests.launch.pod_process import kill_container

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(next(word for word in sys.argv if word.startswith("run_dir="))[8:])
folder = pathlib.Path(sys.argv[sys.argv.index("--config-dir") + 1])
assert (folder / "job.yaml").exists()
node = os.environ["SLURM_NODEID"]
run.mkdir(parents=True, exist_ok=True)
starts = run / f"starts-{node}"
starts.write_text(str(int(starts.read_text()) + 1 if starts.exists() else 1))
def saved(*_):
    print("checkpoint saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("STAND_IN_DEAF") else saved)
print("node", node, "of", os.environ["SLURM_NNODES"], flush=True)
if node == "0":
    with open(run / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": 3, "loss": 1.5}), file=file)
time.sleep(float(os.environ.get("STAND_IN_S", "0.3")))
codes = os.environ.get("STAND_IN_CODES", "0").split(",")
sys.exit(int(codes[min(int(starts.read_text()), len(codes)) - 1]))
"""


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self.state = folder, folder / "slurm"
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=200)
        self.python = folder / "python-there"
        (folder / "stand_in.py").write_text(STAND_IN)
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/stand_in.py "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def launch(self, *words: str) -> int:
        there = ["recipe=qlora_8b", "launch=slurm", "hardware=cpu", f"launch.python={self.python}"]
        return launch_job(compose([*there, *words]), self.console)

    @property
    def said(self) -> str:
        return self.text.getvalue()

    @property
    def jobs(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.state.glob("*.json"))]

    @property
    def run_dir(self) -> Path:
        (found,) = (self.folder / "runs" / "qlora_8b").glob("slurm-*")
        return found


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path)}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL_S", 0.1)
    yield Cluster(tmp_path)
    monkeypatch.undo()
    kill_container(f"FAKE_SLURM={tmp_path / 'slurm'}")


def test_a_job_is_submitted_followed_on_all_nodes_and_its_exit_code_comes_back(cluster):
    words = ["launch.nodes=2", "launch.sbatch=['--partition=gpu']", "launch.max_hours=2", "launch.hang_timeout_s=900"]
    assert cluster.launch(*words) == 0
    (job,) = cluster.jobs
    assert (job["nodes"], job["ntasks_per_node"], job["partition"], job["time"]) == ("2", "1", "gpu", "120")
    assert job["signal"] == "TERM@180" and job["requeue"] is True
    assert "| 0: node 0 of 2" in cluster.said and "| 1: node 1 of 2" in cluster.said
    assert "step 3, loss 1.5000" in cluster.said and "running" in cluster.said
    assert "each of its runs has 2 h (launch.max_hours); stopped by that, it is requeued" in cluster.said
    composed = yaml.safe_load(next((cluster.folder / "runs").rglob("job.yaml")).read_text())
    assert composed["hardware"]["nodes"] == 2
    assert composed["launch"] == {"name": "local", "grace_s": 120, "hang_timeout_s": 900}


def test_the_jobs_exit_code_is_the_launchers(cluster):
    assert cluster.launch("launch.env.STAND_IN_CODES='5'") == 5
    assert [job["state"] for job in cluster.jobs] == ["FAILED"]


def test_a_job_that_was_stopped_with_a_checkpoint_goes_back_to_the_queue_and_is_followed_there(cluster):
    """75 without our asking: a time limit or a preemption."""
    assert cluster.launch("launch.env.STAND_IN_CODES='75,75,0'") == 0
    assert len(cluster.jobs) == 1 and (cluster.run_dir / "starts-0").read_text() == "3"
    assert cluster.said.count("pending") >= 2


@pytest.mark.slow
def test_the_same_job_goes_on_in_the_same_run_directory(cluster):
    cluster.launch("launch.env.STAND_IN_CODES='4'")
    cluster.launch()
    assert (cluster.run_dir / "starts-0").read_text() == "2"


def test_ctrl_c_lets_the_job_save_a_checkpoint_and_does_not_requeue_it(cluster):
    when(lambda: all(f"node {node} of 2" in log(cluster) for node in (0, 1)), press)
    with pytest.raises(StoppedOnRequest):
        cluster.launch("launch.nodes=2", "launch.env.STAND_IN_S='60'")
    assert log(cluster).count("checkpoint saved") == 2
    assert [job["state"] for job in cluster.jobs] == ["FAILED"]
    assert "cancelled job" in cluster.said and "scontrol requeue" not in (cluster.state / "asked").read_text()


@pytest.mark.parametrize("where, theirs", [("slurm", True), ("ssh", False)])
def test_a_terminal_that_closes_leaves_what_waits_in_a_queue(where, theirs, monkeypatch):
    def run_there(launch, tokens):
        return signal.getsignal(signal.SIGHUP) == signal.SIG_DFL

    for name in ("run_by_slurm", "run_by_ssh"):
        monkeypatch.setattr(job_module, name, run_there)
    monkeypatch.setattr(job_module, "problems", lambda composed: [])
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # as train.py has it
    try:
        assert launch_job(compose([f"launch={where}", "launch.hosts=[one]"][: 2 - theirs]), Console()) is theirs
    finally:
        assert callable(signal.signal(signal.SIGHUP, before))


def log(cluster) -> str:
    return "".join(path.read_text() for path in (cluster.folder / "runs").rglob("slurm.log"))


@pytest.mark.slow
def test_a_job_that_does_not_listen_is_cancelled_after_the_time_for_a_checkpoint(cluster, monkeypatch):
    monkeypatch.setattr(order, "MARGIN_S", 0)
    when(lambda: "node 0 of 1" in log(cluster), press)
    with pytest.raises(StoppedOnRequest):
        cluster.launch("launch.env.STAND_IN_S='60'", "launch.env.STAND_IN_DEAF='1'", "launch.grace_s=1")
    assert [job["state"] for job in cluster.jobs] == ["CANCELLED"]
    assert "scancel --signal=TERM" in (cluster.state / "asked").read_text()


def test_a_job_that_has_not_started_yet_is_cancelled(cluster, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_FULL", "1")
    monkeypatch.setattr(slurm._Submitted, "_follow", lambda self: (_ for _ in ()).throw(StoppedOnRequest("now")))
    with pytest.raises(StoppedOnRequest):
        cluster.launch("launch.env.STAND_IN_S='60'")
    assert [job["state"] for job in cluster.jobs] == ["CANCELLED"]


def test_an_answer_of_sbatch_that_is_lost_makes_no_second_job(cluster, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_LOSE", "1")
    assert cluster.launch() == 0
    assert len(cluster.jobs) == 1


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
        "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source\n",
        "no answer",
    ],
)
def test_where_no_controller_answers_a_login_node_is_named(said):
    text = slurm.refusal(said)
    assert "sbatch:" not in text and "fix: run this on a login node of the cluster, where `sinfo`" in text
    assert slurm.refusal("sbatch: error: invalid partition specified: none\n") == "invalid partition specified: none"
    assert slurm.refusal(" ") == "it gave no reason"


def test_what_sbatch_refuses_is_said_in_its_words(cluster):
    with pytest.raises(LoadmasterError, match="invalid partition specified: none"):
        cluster.launch("launch.sbatch=['--partition=none']")
    assert cluster.jobs == [] and not (cluster.folder / "runs").exists()


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (None, ""), (1, "sbatch: error: Socket timed out on send/recv operation\n"),
        (1, "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received\n"),
        (1, "sbatch: error: Unable to contact slurm controller (connect failure)\n"), (0, ""),
    ],
)
def test_where_there_may_be_a_job_yet_its_files_stay(cluster, monkeypatch, code, answer):
    done = None if code is None else subprocess.CompletedProcess([], code, "a banner\n", answer)
    monkeypatch.setattr(slurm._Submitted, "_call", lambda self, command, env=None: done if env else None)
    with pytest.raises(LoadmasterError, match="did not take the job"):
        cluster.launch()
    assert [path.name for path in (cluster.folder / "runs").rglob("cancelled")] == ["cancelled"]


@pytest.mark.slow
def test_a_controller_that_does_not_always_answer_is_asked_again(cluster, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_SHY", "1")
    assert cluster.launch("launch.env.STAND_IN_S='1'") == 0


def deaf(cluster, monkeypatch, first: int, last: int) -> None:
    """squeue and scancel find no controller at calls first to last of theirs; there are no accounts."""
    call, asked = slurm._Submitted._call, []

    def answer(self, command, env=None):
        if command[0] in ("squeue", "scancel"):
            asked.append(command)
            if first <= len(asked) <= last:
                said = f"{command[0]}: error: Unable to contact slurm controller (connect failure)\n"
                return subprocess.CompletedProcess(command, 1, "", said)
        return None if command[0] == "sacct" else call(self, command, env)

    monkeypatch.setattr(slurm._Submitted, "_call", answer)


def test_a_controller_that_is_restarted_for_minutes_ends_no_job(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "PATIENCE", 3)
    deaf(cluster, monkeypatch, 3, 30)
    assert cluster.launch("launch.env.STAND_IN_S='6'") == 0
    assert cluster.said.count("Slurm does not answer; the job is followed again") == 1


def test_a_job_that_nobody_could_be_told_to_end_is_not_called_cancelled(cluster, monkeypatch):
    deaf(cluster, monkeypatch, 1, 1000)
    monkeypatch.setattr(slurm._Submitted, "_follow", lambda self: (_ for _ in ()).throw(StoppedOnRequest("now")))
    with pytest.raises(StoppedOnRequest):
        cluster.launch("launch.env.STAND_IN_S='60'")
    assert "ATTENTION: Slurm does not answer when asked for job 1000" in cluster.said
    assert "cancelled job" not in cluster.said


def test_a_job_that_slurm_kills_is_an_error_that_says_so(cluster):
    def kill():
        os.environ["FAKE_SLURM"] = str(cluster.state)
        record = fake_slurm.change(cluster.jobs[0]["id"], state="TIMEOUT")
        for pid in (record["batch"], *record["steps"]):
            os.kill(pid, signal.SIGKILL)

    when(lambda: "node 0 of 1" in log(cluster), kill)
    with pytest.raises(LoadmasterError, match=r"ended job 1000 \(TIMEOUT\)"):
        cluster.launch("launch.env.STAND_IN_S='60'")


def test_a_dry_run_prints_the_command_and_the_script_and_submits_nothing(cluster):
    assert cluster.launch("launch.nodes=2", "launch.dry_run=true") == 0
    assert "sbatch --parsable --job-name=loadmaster-qlora_8b-" in cluster.said
    assert "srun --label" in cluster.said and "torchrun.py" in cluster.said
    assert cluster.jobs == [] and not (cluster.folder / "runs").exists()


def test_a_run_directory_with_a_comma_arrives_as_it_is(cluster):
    assert cluster.launch("""run_dir='/ü b/one,two'""", "launch.dry_run=true") == 0
    (line,) = (line for line in cluster.said.splitlines() if line.startswith("srun"))
    assert compose([shlex.split(line)[-1]]).job.run_dir == "/ü b/one,two"


def test_a_folder_with_a_percent_sign_is_none_of_slurms_patterns(cluster, monkeypatch):
    (cluster.folder / "100%j").mkdir()
    monkeypatch.chdir(cluster.folder / "100%j")
    assert cluster.launch("launch.dry_run=true") == 0
    command = shlex.split(next(line for line in cluster.said.splitlines() if line.startswith("sbatch")))
    (output,) = (word for word in command if word.startswith("--output="))
    assert "/100%%j/runs/" in output and "/100%j/" in command[-1]


def test_a_model_that_only_the_nodes_have_is_left_to_them(cluster):
    words = ["model.path=/only/there", "model.name=org/tiny", "launch.dry_run=true"]
    assert cluster.launch(*words) == 0
    assert "no plan here: /only/there is not on this machine" in cluster.said and "sbatch --parsable" in cluster.said


def test_an_interpreter_may_be_named_from_the_home_folder(cluster):
    assert cluster.launch("launch.python=~/venv/bin/python", "launch.dry_run=true") == 0
    assert f"srun {Path.home()}/venv/bin/python " in cluster.said


def test_gpus_are_asked_for_as_planned(cluster):
    assert cluster.launch("hardware=h100_80gb_x8_n2", "launch.dry_run=true") == 0
    assert "--nodes=2 --ntasks-per-node=1 --gpus-per-node=8" in cluster.said
    assert "--nproc-per-node=8" in cluster.said


def test_secrets_come_from_the_environment_and_go_nowhere_else(cluster, monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    assert cluster.launch("launch.secrets.HF_TOKEN=MY_SECRET") == 0
    asked = (cluster.state / "asked").read_text()
    assert SECRET not in cluster.said + everything_written(cluster.folder) + asked


def test_a_secret_that_is_not_set_here_is_refused_before_anything_is_written(cluster):
    with pytest.raises(ConfigError, match="is not set in the environment here"):
        cluster.launch("launch.secrets.HF_TOKEN=NOT_SET_HERE")
    assert cluster.launch("launch.secrets.HF_TOKEN=NOT_SET_HERE", "launch.dry_run=true") == 0
    assert "launch.secrets: NOT_SET_HERE must be in the environment here" in cluster.said
    assert cluster.jobs == [] and not (cluster.folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.sbatch=['partition=gpu']"], "is no option with its value"),
        (["launch.volume=mine"], "has no effect with launch=slurm"),
        (["launch.hosts=[a]"], "has no effect with launch=slurm"),
    ],
)
def test_what_cannot_be_meant_is_refused(cluster, words, said):
    with pytest.raises(ConfigError, match=said):
        cluster.launch(*words)


@pytest.mark.slow
def test_two_nodes_train_one_model(cluster, monkeypatch, few_words):
    """The real script and the real job: one task a node, which find each other by Slurm's variables."""
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["recipe=smoke", "launch=slurm", "hardware=cpu", "launch.nodes=2", f"launch.python={sys.executable}"]
    words += [f"model.path={few_words}", "max_steps=2", "stop_after=train", "sequence_length=256"]
    words += ["batch.global_size=2"]
    assert launch_job(compose([*words, "data.max_rows=40"]), cluster.console) == 0, cluster.said
    assert "on 2 CPU processes" in cluster.said and "of 2, loss" in cluster.said
    (run,) = (cluster.folder / "runs" / "smoke").glob("slurm-*")
    assert json.loads((run / "result.json").read_text())["steps"] == 2


def test_a_folder_in_which_no_launch_can_be_kept_is_a_sentence(cluster, capsys):
    (cluster.folder / "runs").touch()
    words = ["recipe=qlora_8b", "launch=slurm", "hardware=cpu", f"launch.python={cluster.python}"]
    assert run_elsewhere(compose(words), cluster.console) == 4
    assert "runs/qlora_8b" in (said := capsys.readouterr().err) and "start it in a folder that can be written" in said
    assert cluster.jobs == []


def test_without_slurm_that_is_said(cluster, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LoadmasterError, match="login node of a Slurm cluster; there is no sbatch here"):
        cluster.launch()
