"""The command line as a user meets it: exit codes, sweeps, --cfg, --help, and nothing written beside the run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loadmaster import __version__
from loadmaster.cli import main
from loadmaster.config.compose import Composed
from loadmaster.config.hydra_app import run_app
from loadmaster.errors import DoesNotFit, ExportRejected, StoppedOnRequest, TrainingFailed
from loadmaster.training.logs import NAME, log_to

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


class Recorder:
    """A task that remembers its jobs and ends as its seed says."""

    def __init__(self, ends: dict[int, int | BaseException] | None = None):
        self.jobs: list[Composed] = []
        self.ends = ends or {}

    def __call__(self, composed: Composed) -> int:
        self.jobs.append(composed)
        end = self.ends.get(composed.job.seed, 0)
        if isinstance(end, BaseException):
            raise end
        return end


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_task_gets_the_composed_job_and_hydra_writes_nothing(here: Path):
    task = Recorder()
    assert run_app(task, ["recipe=lora_8b", "lora.rank=4", "stop_after=plan"]) == 0
    (composed,) = task.jobs
    assert (composed.job.recipe, composed.job.lora.rank) == ("lora_8b", 4)
    assert composed.origins["lora.rank"] == "command line"
    assert list(here.iterdir()) == []
    assert Path.cwd() == here


@pytest.mark.parametrize("before", [True, False])
def test_nothing_undoes_a_dry_run(before: bool):
    task, flag, setting = Recorder(), "--dry-run", "launch.dry_run=false"
    words = [flag, setting] if before else [setting, flag]
    assert run_app(task, ["recipe=lora_8b", "launch=runpod", *words]) == 0
    assert task.jobs[0].job.launch.dry_run


def test_without_a_word_it_is_the_smoke_recipe():
    """What `make smoke` and the first line of three pages start."""
    task = Recorder()
    assert run_app(task, []) == 0
    assert [composed.job.recipe for composed in task.jobs] == ["smoke"]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (DoesNotFit("nothing fits"), 3),
        (TrainingFailed("loss is not finite"), 4),
        (ExportRejected("fp8 did not pass"), 5),
        (StoppedOnRequest("saved"), 75),
        (3, 3),
        (75, 75),
    ],
)
def test_the_tasks_exit_code_survives_hydra(end: int | BaseException, code: int, capsys: pytest.CaptureFixture[str]):
    assert run_app(Recorder({42: end}), ["stop_after=plan"]) == code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    word = "" if code == 75 else "error: "  # to stop was what was asked for
    assert errors == (f"{word}{end}\n" if isinstance(end, BaseException) else "")


def test_a_wrong_configuration_is_exit_code_2_with_every_problem_and_the_task_is_not_called(
    capsys: pytest.CaptureFixture[str],
):
    task = Recorder()
    assert run_app(task, ["lora.rnk=8", "seed=x", "hardware=nope"]) == 2
    assert task.jobs == []
    assert capsys.readouterr().err.startswith(
        "3 problems in the configuration; nothing was started.\n\n"
        "  1. lora.rnk = 8   on the command line\n     there is no such field\n     fix: lora.rank=8\n\n"
        "  2. seed = x   on the command line\n     must be an integer of at least 0 and below 9223372036854775808\n"
        "     fix: seed=42 is the default\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--multirun", "seed=1,2"], ["hydra.output_subdir=.hydra"]])
def test_a_defect_in_the_task_is_a_traceback_of_its_own(arguments: list[str]):
    def broken(composed: Composed) -> int:
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        run_app(broken, [*arguments, "stop_after=plan"])


@pytest.mark.parametrize(("end", "code", "said"), [("no disk", 1, "no disk\n"), (7, 7, ""), (None, 0, "")])
def test_a_task_that_exits_by_itself_does_so_as_from_python(
    end: object, code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert run_app(Recorder({42: SystemExit(end)}), ["hydra.output_subdir=.hydra", "stop_after=plan"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("recipe", "arguments", "said"),
    [
        ("{run: {dir: '${missing.key}'}}", [], "hydra.run.dir   in the recipe"),
        ("{callbacks: {x: {_target_: nowhere.Nope}}}", [], "Error locating target 'nowhere.Nope'"),
        ("{job_logging: {root: {level: NOPE}}}", [], "Hydra stops at it: Unable to configure"),
        ("null", [], "hydra   in recipes/mine.yaml:2"),
        ("[1, 2]", ["hydra.run.dir=x"], "hydra   in recipes/mine.yaml:2"),
        ("{}", ["--cfg", "job", "--resolve", "run_dir=${nope.x}"], "run_dir = ${nope.x}   on the command line"),
        ("{}", ["-m", "hydra.sweep.dir='${nope}'"], "hydra.sweep.dir   on the command line"),
        ("{}", ["-m", "optimizer.lr=interval(1,3)"], "optimizer.lr=A,B,C"),
        ("{}", ["-m", 'hydra.sweeper.params={seed:"1,2"}'], "--multirun seed=1,2"),
        ("{}", ["-m", '+hydra.sweeper.params.seed="1,2"'], "--multirun seed=1,2"),
        ("{}", ["-m", "hydra.run.dir=out", 'hydra.sweeper.params={seed:"1,2"}'], "--multirun seed=1,2"),
        ("{}", ["run_dir=${hydra:runtime.output_dir}/x"], "Hydra makes only after the job was judged"),
        ("{}", ["data.path=['${hydra:runtime.output_dir}/x']"], "Hydra makes only after the job was judged"),
    ],
)
def test_a_mistake_in_hydras_own_settings_is_a_problem_like_any_other(
    here: Path, recipe: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    (here / "recipes").mkdir()
    (here / "recipes" / "mine.yaml").write_text(f"# one that sets something of Hydra's own\nhydra: {recipe}\n")
    task = Recorder()
    assert run_app(task, ["recipe=mine", "stop_after=plan", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("1 problem in") and said in errors and task.jobs == []


@pytest.mark.parametrize("own", [[], ["hydra/job_logging=disabled"]])
def test_every_job_of_a_sweep_has_a_log(here: Path, own: list[str]):
    def task(composed: Composed) -> int:
        log_to(here / str(composed.job.seed), rank=0)
        logging.getLogger(NAME).info("began")
        return 0

    assert run_app(task, ["-m", "seed=1,2,3", *own, "stop_after=plan"]) == 0
    for seed in (1, 2, 3):
        assert (here / str(seed) / "logs" / "rank-0.log").read_text().endswith(" began\n")


def test_a_sweep_runs_every_combination_and_ends_with_the_worst_code(here: Path):
    task = Recorder({1: TrainingFailed("no"), 2: 3})
    assert run_app(task, ["--multirun", "seed=1,2,3", "method=lora,qlora", "stop_after=plan"]) == 4
    assert [(c.job.seed, c.job.method) for c in task.jobs] == [
        (1, "lora"), (1, "qlora"), (2, "lora"), (2, "qlora"), (3, "lora"), (3, "qlora"),
    ]
    assert {c.job.run_dir for c in task.jobs} == {"auto"}
    (record,) = files(here)
    assert record.startswith("runs/sweeps/")
    assert record.endswith("multirun.yaml")


def test_a_sweep_may_name_its_run_directories_by_job(here: Path):
    task = Recorder()
    assert run_app(task, ["-m", "recipe=smoke,qlora_8b", "run_dir='out/${hydra:job.num}'", "stop_after=plan"]) == 0
    assert [(c.job.recipe, c.job.run_dir) for c in task.jobs] == [("smoke", "out/0"), ("qlora_8b", "out/1")]


def test_every_job_of_a_sweep_is_judged_before_the_first_starts(capsys: pytest.CaptureFixture[str]):
    task = Recorder()
    assert run_app(task, ["-m", "seed=1,2", "method=lora,lorra", "recipe=smoke,smok", "run_dir=same"]) == 2
    assert task.jobs == []
    errors = capsys.readouterr().err
    assert "method = lorra " in errors
    assert "recipe = smok " in errors
    assert "several jobs of the sweep would write into this one folder" in errors


def test_a_sweep_that_cannot_keep_its_record_is_a_sentence(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "runs").touch()
    task = Recorder()
    assert run_app(task, ["-m", "seed=1,2", "stop_after=plan"]) == 2
    errors = capsys.readouterr().err
    assert "the record of a sweep cannot be written there: runs" in errors and "hydra.sweep.dir=FOLDER" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=1", "seed=2"], "note: seed is given as 1 and 2: the last one counts\n"),
        (["++seed=1", "seed=2"], "note: seed is given as 1 and 2: the last one counts\n"),
        (["recipe=smoke", "recipe=auto"], "counts; recipe=[smoke,auto] lays each over those before it\n"),
        (["hardware=cpu", "hardware=local", "--cfg", "job"], "note: hardware is given as cpu and local: the last"),
    ],
)
def test_of_several_values_of_a_key_the_last_counts_and_a_note_says_so(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    task = Recorder()
    assert run_app(task, arguments) == 0
    assert said in capsys.readouterr().err
    assert "seed=2" not in arguments or task.jobs[0].job.seed == 2


@pytest.mark.parametrize("words", [["plan", "--json"], ["data"]])
def test_every_command_that_takes_a_job_says_so(words: list[str], capsys: pytest.CaptureFixture[str]):
    main([*words, "seed=1", "seed=2", "hardware=cpu"])
    assert "note: seed is given as 1 and 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--cfg", "seed=3"], ["seed=3", "-c"], ["--info", "seed=3"], ["-i", "~seed"]])
def test_looking_needs_no_word_that_says_at_what(words: list[str], capsys: pytest.CaptureFixture[str]):
    task = Recorder()
    assert run_app(task, words) == 0 and task.jobs == []
    assert "usage" not in capsys.readouterr().err


def test_a_key_may_be_given_the_same_value_twice_and_beside_its_group(capsys: pytest.CaptureFixture[str]):
    task = Recorder()
    assert run_app(task, ["seed=1", "seed=1", "hardware=cpu", "hardware.count=2", "stop_after=plan"]) == 0
    assert task.jobs[0].job.hardware.count == 2
    assert "note" not in capsys.readouterr().err


def test_a_sweep_that_is_stopped_does_not_go_on_with_the_next_job():
    task = Recorder({1: StoppedOnRequest("checkpoint saved")})
    assert run_app(task, ["-m", "seed=1,2", "stop_after=plan"]) == 75
    assert [c.job.seed for c in task.jobs] == [1]


def test_a_users_own_primary_file_leaves_no_folder_of_hydras(here: Path, capsys: pytest.CaptureFixture[str]):
    """Nor anything said twice, though it has nothing of Hydra's settings in it."""
    (here / "mine").mkdir()
    own = {"defaults": ["schema_defaults", "_self_", {"model": "smollm2_135m"}, {"data": "tickets"}], "recipe": "mine"}
    (here / "mine/own.yaml").write_text(yaml.safe_dump(own))
    task, before = Recorder(), files(here)
    assert run_app(task, ["--config-dir=mine", "--config-name=own", "seed=3"]) == 0
    (composed,) = task.jobs
    assert composed.job.seed == 3 and not composed.needs_hydra and files(here) == before
    assert run_app(task, ["--config-dir=mine", "--config-name=own", "--multirun", "seed=4,5"]) == 0
    assert {path.split("/")[0] for path in files(here)} <= {"mine", "runs"}
    assert run_app(task, ["--config-dir=mine", "--config-name=own", "hydra.run.dir=there"]) == 0
    assert (here / "there").is_dir() and task.jobs[-1].needs_hydra  # what is asked for is done


def test_cfg_job_prints_every_field_as_yaml_and_starts_nothing(capsys: pytest.CaptureFixture[str]):
    task = Recorder()
    assert run_app(task, ["recipe=lora_8b", "--cfg", "job", "lora.rank=3", "data=file"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lora"]["rank"] == 3
    assert printed["sequence_length"] == 4096
    assert printed["model"]["name"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert printed["checkpoint"]["keep_last"] == 2
    assert printed["data"]["path"] == "???"
    assert task.jobs == []


@pytest.mark.parametrize(
    ("words", "key", "value", "said"),
    [
        (["lora.rnk=8"], "rnk", 8, "fix: lora.rank=8"),
        (["lora.rank=-8"], "rank", -8, "must be an integer above 0"),
        (["+lora.foo=1", "data=file"], "foo", 1, "there is no such field"),
    ],
)
def test_a_job_that_could_not_start_is_shown_with_what_is_wrong_with_it(
    words: list[str], key: str, value: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert run_app(Recorder(), ["recipe=lora_8b", *words, "--cfg", "job"]) == 2
    out, err = capsys.readouterr()
    assert f"{key}: {value}" in out
    assert said in err and "1 problem in the configuration" in err


def test_help_lists_recipes_groups_and_fields(capsys: pytest.CaptureFixture[str]):
    assert run_app(Recorder(), ["--help"]) == 0
    text = capsys.readouterr().out
    assert "recipe: auto, fp8_405b, fp8_70b, fp8_8b, full_70b, full_8b, lora_8b" in text
    assert "hardware: a100_80gb_x1" in text
    assert "micro_batch_size: auto" in text
    assert "launch=runpod --dry-run" in text and "--multirun, -m" in text and "--config-dir, -cd" in text
    assert "print loadmaster's version" in text and 'eval "$(python train.py -sc' in text and "main()" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe=smoke"], "fields are set without dashes: recipe=smoke"),
        (["--lr=1e-4"], "fields are set without dashes: optimizer.lr=0.0001"),
        (["--gradient_accumulation_steps=4"], "fields are set without dashes: batch.global_size=...; Packed rows"),
        (["--format", "fp8"], "fields are set without dashes: export.formats=[fp8]"),
        (["--format", "alpaca"], "fields are set without dashes: data.format="),
        (["--load-in-4bit=true"], "fields are set without dashes: method=qlora"),
        (["--optim"], "fields are set without dashes: optimizer.name=..."),
        (["--learning_rate", "1e-4", "seed=1"], "1 problem in the configuration; nothing was started.\n\n"
         "  1. --learning_rate 1e-4   on the command line\n     there is no such option\n     fix: fields are set "
         "without dashes: optimizer.lr=0.0001"),
        (["--lr", "--bf16", "seed=a"], "3 problems in the configuration"),
        (["--config", "my/own.yml"], "1 problem in the configuration; nothing was started.\n\n  1. --config my/own"),
        (["--config=my/own.yml"], "put it into recipes/ here as own.yaml, then recipe=own"),
        (["--config_file", "smoke.yaml"], "fix: recipe=smoke"),
        (["--config"], "fix: recipe=NAME"),
        (["--logging_steps=1"], "take it out: every step is logged"),
        (["--conf", "."], "fix: recipe=NAME"),
        (["--config", "x" * 300], "put it into recipes/ here as xxx"),
        (["--nodes=1..4"], "fix: loadmaster plan ... --nodes=1..4; no other command has it"),
        (["--nodes", "1..4"], "fix: loadmaster plan ... --nodes 1..4; no other command has it"),
        (["--json"], "fix: loadmaster plan ... --json"),
        (["--multirum", "seed=1"], "fix: --multirun"),
        (["--config-path=x"], "--config-dir adds to it"),
        (["--experimental-rerun", "config.pickle"], "the same command goes on where its run stopped"),
        (["--config-name=trian"], "one of train"),
        (["--cfg", "job", "recipe=smok"], "recipe=smoke"),
        (["--cfg", "job", "--multirun", "seed=1,2"], "--cfg   on the command line\n     does not go with --multirun"),
        (["--resolve"], "--cfg job --resolve"),
        (["--shell-completion"], "--shell-completion install=bash"),
        (["-sc", "install=tcsh"], "the shells are bash, fish, zsh"),
        (["-sc", "install=bash", "uninstall=bash"], "wants install=SHELL, or uninstall=SHELL"),
        (["-sc", "query=bash"], "wants install=SHELL, or uninstall=SHELL"),
    ],
)
def test_a_wrong_flag_is_a_problem_like_any_other(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert run_app(Recorder(), arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["plan", "--jsn"], "--json"), (["train", "--dry-rn"], "--dry-run"),
        (["plan", "recipe=smoke", "--nodse=1..4"], "--nodes"),
    ],
)
def test_a_misspelt_flag_of_a_stage_is_answered_with_its_own(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 2
    assert f"fix: {meant}\n" in capsys.readouterr().err


def test_the_version_is_loadmasters_own(capsys: pytest.CaptureFixture[str]):
    assert run_app(Recorder(), ["--version"]) == 0
    assert capsys.readouterr().out == f"loadmaster {__version__}\n"


@pytest.mark.parametrize(("rank", "local_rank", "prints"), [("0", "0", True), ("3", "3", False), ("8", "0", True)])
def test_one_process_of_each_host_prints_the_problems_which_may_be_of_that_host_only(
    rank: str, local_rank: str, prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    launched = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert run_app(Recorder(), ["seed=x"]) == 2
    assert ("seed" in capsys.readouterr().err) == prints


@pytest.mark.parametrize(
    "left_over",
    [{"RANK": "3"}, {"RANK": ""}, {"LOCAL_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}],
)
def test_a_rank_that_another_launcher_left_silences_nobody(
    left_over: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert run_app(Recorder(), ["seed=x"]) == 2
    assert "seed" in capsys.readouterr().err


def test_the_command_is_put_back_for_reports_to_quote(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "lora.rank=3", "stop_after=plan"])

    def task(composed: Composed) -> int:
        seen.append(list(sys.argv))
        return 0

    assert run_app(task) == 0
    assert seen == [["train.py", "lora.rank=3", "stop_after=plan"]]
    assert sys.argv == ["train.py", "lora.rank=3", "stop_after=plan"]


def test_train_py_from_another_folder(here: Path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(REPOSITORY / "train.py")]
    wrong = subprocess.run([*command, "lora.rnk=8"], capture_output=True, text=True, env=environment, cwd=here)
    assert wrong.returncode == 2
    assert "fix: lora.rank=8" in wrong.stderr
    assert wrong.stdout == ""
    shown = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True, env=environment, cwd=here)
    assert shown.returncode == 0, shown.stderr
    info = subprocess.run(
        [*command, "lora.rank=3", "--info"], capture_output=True, text=True, env=environment, cwd=here
    )
    assert info.returncode == 0, info.stderr
    assert "recipe/smoke" in info.stdout
    assert "rank: 3" in info.stdout
    assert yaml.safe_load(shown.stdout)["data"]["path"] == "shipped:tickets/train.jsonl"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "runs"),
    [
        ([], False),
        (["recipe=lora_8b", "lora.rank=4"], False),
        (["hydra.output_subdir=.hydra"], True),
        (["hydra/job_logging=default"], True),
        (["hydra.job_logging={root: {level: WARNING}}"], True),
        (["hydra.run.dir=elsewhere"], True),
    ],
)
def test_hydra_runs_a_job_itself_where_it_is_told_to_do_more_than_compose(
    here: Path, overrides: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
):
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # of an earlier test
    seen: list[bool] = []

    def task(composed: Composed) -> int:
        seen.append(HydraConfig.initialized())
        return 0

    assert run_app(task, [*overrides, "stop_after=plan"]) == 0
    assert seen == [runs]
    assert (here / ".hydra" / "config.yaml").is_file() == ("hydra.output_subdir=.hydra" in overrides)


def test_a_callback_of_the_users_own_configuration_is_called(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "conf").mkdir()
    (here / "told.py").write_text(
        "from hydra.experimental.callback import Callback\n\n\nclass Told(Callback):\n"
        "    def on_job_start(self, config, **_):\n        print('callback called')\n"
    )
    shipped = (REPOSITORY / "conf" / "train.yaml").read_text()
    own = shipped.replace("hydra:\n", "hydra:\n  callbacks: {told: {_target_: told.Told}}\n")
    (here / "conf" / "train.yaml").write_text(own)
    sys.path.insert(0, str(here))
    try:
        assert run_app(Recorder(), ["stop_after=plan"]) == 0
    finally:
        sys.path.remove(str(here))
    assert "callback called" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir='out/${hydra:job.name}'",
        "hydra.job.chdir=${hydra:job.num}",
        "hydra/hydra_logging=[disabled]",
    ],
)
def test_hydras_own_settings_may_be_anything_that_hydra_takes(here: Path, override: str):
    task = Recorder()
    assert run_app(task, [override, "stop_after=plan"]) == 0
    assert len(task.jobs) == 1


def test_the_folders_of_a_sweep_may_name_its_jobs(here: Path):
    task = Recorder()
    assert run_app(task, ["-m", "seed=1,2", "hydra.run.dir='out/${hydra:job.num}'", "stop_after=plan"]) == 0
    assert [composed.job.seed for composed in task.jobs] == [1, 2]


def test_a_sweep_that_a_file_asks_for_is_one(here: Path):
    (here / "conf" / "tracker").mkdir(parents=True)
    own = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    (here / "conf" / "tracker" / "multi.yaml").write_text(own)
    task = Recorder()
    assert run_app(task, ["tracker=multi", "stop_after=plan"]) == 0
    assert [composed.job.seed for composed in task.jobs] == [1, 2]


def test_output_that_nobody_reads_is_no_mistake_in_the_configuration(here: Path):
    command = f"{sys.executable} -m loadmaster plan --cfg all | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
