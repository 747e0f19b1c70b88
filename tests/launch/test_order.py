"""What is sent to a machine: pinned, whole, without secrets, and the same for the same job."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import shlex
import tarfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from loadmaster.config.compose import compose
from loadmaster.data import prepared, refuse_bad_rows
from loadmaster.errors import ConfigError, DataError, DoesNotFit, ProviderError
from loadmaster.launch import check, choose, job, order, payload
from loadmaster.launch.choose import choices, counts, wanted
from loadmaster.launch.follow import Reader, unpack
from loadmaster.launch.provider import LogLine, Offer
from loadmaster.launch.runpod import rental
from loadmaster.launch.runpod.listed import Listed
from loadmaster.launch.runpod.types import Pod
from loadmaster.pipeline import Pipeline, run_elsewhere
from loadmaster.preflight import make_plan
from tests.runs import ROOT

WORDS = ["recipe=qlora_8b", "launch=runpod", 'launch.package="loadmaster==0.1.0"']
OFFERS = [
    Offer("l40s", "NVIDIA L40S", 1, 0.99, ("EU-RO-1",)),
    Offer("l40s", "NVIDIA L40S", 2, 1.98, ("US-TX-3",)),
    Offer("h100_80gb", "NVIDIA H100 80GB HBM3", 1, 3.99, ("EU-RO-1", "US-TX-3")),
]


def composed(*words):
    return compose([*WORDS, *words])


def ordered(*words, now=1_000_000.0, name="loadmaster-x"):
    job = composed(*words)
    choice = choices(job.job, OFFERS, 200_000)[0]
    return order.make_order(job, choice, name, now, "http://127.0.0.1/v2", None, ("EU-RO-1",))


def unpacked(made) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(made.env["LOADMASTER_PAYLOAD"]))) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


@pytest.mark.parametrize(
    ("words", "best"),
    [
        ([], "1x l40s"),
        (["launch.objective=time"], "1x h100_80gb"),
        (["launch.gpus=[h100_80gb]"], "1x h100_80gb"),
        (["launch.gpus=[l40s:2,h100_80gb:1]"], "2x l40s"),
        (["launch.objective=time", "launch.max_usd_per_hour=2"], "2x l40s"),
        (["launch.data_centers=[US-TX-3]"], "2x l40s"),
        (["hardware=h100_80gb_x1"], "1x h100_80gb"),
    ],
)
def test_the_machine_is_picked_by_objective_within_the_limits(words, best):
    assert choices(composed(*words).job, OFFERS, 200_000)[0].offer.label == best


SMALL = Offer("rtx4090", "NVIDIA GeForce RTX 4090", 1, 0.69, ("EU-RO-1",))


def test_a_machine_without_a_price_is_not_taken_for_one_that_costs_nothing():
    free = replace(OFFERS[2], usd_per_hour=0.0)
    job = composed("launch.max_usd=5").job
    assert [choice.offer for choice in choices(job, [free, *OFFERS[:1]], 200_000)] == OFFERS[:1]
    with pytest.raises(DoesNotFit, match="1x h100_80gb: the provider names no price for it"):
        choices(job, [free], 200_000)


def test_a_batch_that_does_not_divide_is_no_want_of_memory():
    with pytest.raises(DoesNotFit, match=r"1\.98/h, batch\.global_size=7 does not divide over 2 GPUs; use batch"):
        choices(composed("batch.global_size=7", "launch.gpus=[l40s:2]").job, OFFERS, 200_000)


def test_a_machine_that_the_catalogue_does_not_know_is_not_called_out_of_stock_where_nobody_was_asked():
    with pytest.raises(ProviderError, match="the catalogue knows no 3x h100_80gb to rent; with RUNPOD_API_KEY set"):
        Listed().offers(["h100_80gb"], (3,), "secure")
    with pytest.raises(ProviderError, match="the catalogue knows no machine with rtx3090 to rent"):
        Listed().offers(["rtx3090"], (1, 2, 4, 8), "secure")


def test_a_machine_whose_exports_are_verified_from_host_memory_costs_that_time():
    """8B in bf16, which the export is verified as, and 128 answers are more than a 4090 holds; the training is not."""
    many = ("evaluation.batch_size=128", "evaluation.max_new_tokens=128")
    ranked = choices(composed(*many).job, [SMALL, *OFFERS], 200_000)
    assert ranked[0].offer.label == "1x l40s" and all(choice.can_export for choice in ranked)
    small = next(choice for choice in ranked if choice.offer == SMALL)
    found = small.plan.verification
    assert found["layers"]["host"] > 0 and 0 < found["moving_hours"] < small.hours
    alone = choices(composed(*many, "stop_after=evaluate").job, [SMALL], 200_000)[0]
    assert small.hours - alone.hours > found["moving_hours"]  # and what writes and reads the exports


def test_a_machine_that_trains_and_cannot_export_comes_last(monkeypatch):
    def planned(job, *tokens):
        plan = make_plan(job, *tokens)
        cannot = job.hardware.gpu == "rtx4090"
        return replace(plan, verification={**plan.verification, "fits": False}) if cannot else plan

    small = SMALL
    monkeypatch.setattr(choose, "make_plan", planned)
    ranked = choices(composed().job, [small, *OFFERS], 200_000)
    assert ranked[0].offer.label == "1x l40s" and ranked[-1].offer == small
    assert [choice.can_export for choice in ranked] == [True] * 3 + [False]
    assert choices(composed("stop_after=evaluate").job, [small, *OFFERS], 200_000)[0].offer == small
    assert choices(composed("launch.gpus=[rtx4090]").job, [small, *OFFERS], 200_000)[0].offer == small


def test_without_the_size_of_the_data_machines_are_ranked_by_the_token():
    ranked = choices(composed().job, OFFERS, None)
    assert [choice.usd for choice in ranked] == [None] * 3
    prices = [choice.offer.usd_per_hour / choice.plan.tokens_per_second for choice in ranked]
    assert prices == sorted(prices)


def test_only_the_counts_that_matter_are_asked_for():
    assert counts(wanted(composed("launch.gpus=[l40s:2,h100_80gb:8]").job)) == (2, 8)
    assert counts(wanted(composed("launch.gpus=[l40s]").job)) == (1, 2, 4, 8)


def test_what_the_catalogue_has_no_machine_of_is_rented_only_when_it_is_named(monkeypatch):
    assert "a40" not in [gpu for gpu, _ in wanted(composed().job)]
    assert wanted(composed("launch.gpus=[a40:2]").job) == [("a40", 2)]
    assert wanted(composed("hardware.gpu=a40", "hardware.count=2").job) == [("a40", 2)]
    with pytest.raises(ConfigError, match="no cluster of 2 nodes has it"):
        wanted(composed("launch.gpus=[a40]", "launch.nodes=2").job)
    with pytest.raises(ProviderError, match="no machine with a40 to rent; with RUNPOD_API_KEY set"):
        Listed().offers(["a40"], (1,), "secure")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.gpus=[l40]"], r"is not in the catalogue\s+fix: launch.gpus=\[l40s\]; one of"),
        (["launch.gpus=['l40s:3']"], "has no such count"),
        (["launch.gpus=[l40s]", "hardware=h100_80gb_x1"], "names the machine already"),
    ],
)
def test_machines_that_cannot_be_meant_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        wanted(composed(*words).job)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["launch.package=loadmaster"], "launch.package"),
        (["launch.package=null"], "launch.package"),
        *(
            ([f'launch.package="{package}"'], "launch.package")
            for package in (
                f"git+https://me:abc@github.com/me/it@{'0' * 40}",
                f"loadmaster@https://abc@host/it.whl#sha256={'0' * 64}",
                "HTTPS://abc@host/it.whl",
                f"https://host/loadmaster-0.1.0-py3-none-any.whl?private_token=abc&x=1#sha256={'0' * 64}",
                f"https://host/it.whl?X-Amz-Date=1&X-Amz-Signature=abc#sha256={'0' * 64}",
                f"git+ssh://me:abc@host:22/it@{'0' * 40}",
            )
        ),
        (["launch.image=a/b"], "launch.image"),
        (["launch.volume_gb=9"], "launch.volume_gb"),
        (["launch.volume_gb=5000"], "launch.volume_gb"),
        (["launch.volume=' '"], "launch.volume"),
        (["launch.fetch=true", "launch.volume=null"], "launch.fetch"),
        (["launch.fetch=true", "stop_after=train"], "launch.fetch"),
        (["launch.cloud=community"], "launch.cloud"),
        (["launch.env.WANDB_API_KEY=abc"], "launch.env.WANDB_API_KEY"),
        (["launch.env.WANDB_KEY=abc"], "launch.env.WANDB_KEY"),
        *(
            ([f"launch.env.IT='{value}'"], "launch.env.IT")
            for value in (
                "https://abc@host/simple", "https://me:abc@host", "redis://:abc@host:6379", "https://host/?sig=abc",
                "sk-proj-abc45678-01234567890", "sk-or-v1-abc45678-01234567890",
                "xoxb-1234567890-abc4567890",
            )
        ),
        (["launch.secrets.HF_TOKEN=hf_abcDEFghiJKLmnop"], "launch.secrets.HF_TOKEN"),
        (["launch.secrets.WANDB_API_KEY=0abc456789abcdef0123456789abcdef01234567"], "launch.secrets.WANDB_API_KEY"),
        (["launch.secrets.KEY=''"], "launch.secrets.KEY"),
        (["hardware=cpu"], "hardware.gpu"),
        (["run_dir=here"], "run_dir"),
    ],
)
def test_each_mistake_has_its_remedy(words, key):
    (problem,) = check.problems(composed(*words))
    assert problem.key == key and problem.remedy
    assert "abc" not in str(problem)


def test_a_setting_of_tokenizers_is_no_secret():
    assert check.problems(composed("launch.env.TOKENIZERS_PARALLELISM='false'")) == []


@pytest.mark.parametrize("address", ["https://github.com/me/it", "ssh://git@github.com:22/me/it", "ssh://host:22/it"])
def test_an_address_without_a_key_is_none_with_one(address):
    assert check.problems(composed(f'launch.package="git+{address}@{"0" * 40}"')) == []


def test_a_secret_without_a_name_is_not_called_one():
    (problem,) = check.problems(composed("launch.secrets.HF_TOKEN=''"))
    assert problem.message == "wants the name of a secret, and this is empty"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch=ssh", "stop_after=plan"], "stop_after = plan   on the command line"),
        (["launch=ssh"], "launch.hosts = []   in default"),
        (["launch.gpus=[h100]", "launch.dry_run=true"], "launch.gpus = h100   on the command line"),
        (["launch=ssh", "launch.hosts=[a]", "launch.secrets.K=NO_SUCH"], "launch.secrets = NO_SUCH   on the command"),
    ],
)
def test_what_cannot_be_launched_is_said_with_where_it_was_set(words, said, capsys):
    run_elsewhere(compose(["recipe=qlora_8b", "launch=runpod", *words]), Console(quiet=True))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf", "my_hf", "HF_TOKEN", "hf_token", "huggingface-read", "sk.prod", "wandb_2026"])
def test_names_of_secrets_are_taken(name):
    assert check.problems(composed(f"launch.secrets.HF_TOKEN={name}")) == []


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_job_of_every_recipe_composes_there_as_it_did_here(recipe, tmp_path):
    here = compose([f"recipe={recipe}", "hardware=h100_80gb_x8", "launch=runpod"])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(payload.job_there(here, here.job.hardware), sort_keys=False))
    there = compose([], config_dir=str(tmp_path), config_name="job")
    assert replace(there.job, launch=here.job.launch) == here.job
    assert not there.needs_hydra  # which would log each line once more, into a folder outputs/ of its own as well


def test_the_payload_is_the_job_for_that_machine_with_its_data(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"messages": []}\n')
    times = tmp_path / "requests.csv"
    times.write_text("0\n1\n")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    words = ("data=file", f"data.path={data}", f"endpoint.arrivals={times}", f"model.chat_template={template}")
    made = ordered(*words)
    files = unpacked(made)
    job = yaml.safe_load(files["job.yaml"])
    assert job["hardware"] == {"gpu": "l40s", "count": 1, "nodes": 1}
    assert job["launch"] == {"name": "local", "grace_s": 120, "hang_timeout_s": "auto"}
    assert job["data"]["path"] == "data/0-mine.jsonl"
    assert files["data/0-mine.jsonl"] == data.read_bytes()
    assert job["model"]["chat_template"] == "data/1-mine.jinja"
    assert files["data/1-mine.jinja"] == template.read_bytes()
    assert job["endpoint"]["arrivals"] == "data/2-requests.csv"
    assert files["data/2-requests.csv"] == times.read_bytes()
    assert str(tmp_path) not in json.dumps(job)


def test_a_trace_of_requests_that_is_too_large_to_travel_is_named_itself(tmp_path):
    times = tmp_path / "requests.csv"
    draw = random.Random(0)
    times.write_text("".join(f"{second},{draw.getrandbits(128)}\n" for second in range(10_000)))
    with pytest.raises(ConfigError, match=r"endpoint\.arrivals.*\n.*KiB(.|\n)*its first thousands of requests"):
        ordered(f"endpoint.arrivals={times}")


def test_data_that_is_too_large_to_travel_is_refused_with_a_way_out(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_bytes(random.Random(0).randbytes(200_000))
    with pytest.raises(ConfigError, match=r"it goes to the volume by itself; or publish it as a \(private\) Hub"):
        ordered("data=file", f"data.path={data}")


def test_data_that_is_too_large_to_travel_goes_to_the_volume_under_its_hash(tmp_path):
    data = tmp_path / "meine daten.jsonl"
    data.write_bytes(random.Random(0).randbytes(200_000))
    job = composed("data=file", f"data.path='{data}'")
    choice = choices(job.job, OFFERS, 200_000)[0]
    made = order.make_order(job, choice, "loadmaster-x", 0.0, "http://127.0.0.1/v2", None, ("EU-RO-1",), True)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    (upload,) = made.uploads
    assert upload.name == f"loadmaster/data/{digest[:16]}-meine daten.jsonl" and upload.sha256 == digest
    files = unpacked(made)
    assert list(files) == ["job.yaml"]
    assert yaml.safe_load(files["job.yaml"])["data"]["path"] == f"/workspace/{upload.name}"
    small = composed("data=file", "data.path=/workspace/data/mine.jsonl")
    made = order.make_order(small, choice, "loadmaster-x", 0.0, "http://127.0.0.1/v2", None, ("EU-RO-1",), True)
    assert made.uploads == ()


def test_data_on_the_volume_is_named_by_its_path_there():
    made = ordered("data=file", "data.path=/workspace/data/mine.jsonl")
    assert yaml.safe_load(unpacked(made)["job.yaml"])["data"]["path"] == "/workspace/data/mine.jsonl"


def test_the_same_job_goes_on_in_the_same_folder_and_other_data_in_another(tmp_path):
    def folder(text, *words):
        data = tmp_path / "mine.jsonl"
        data.write_text(text)
        return json.loads(ordered("data=file", f"data.path={data}", *words).env["LOADMASTER_JOB"])["run_dir"]

    assert folder("a") == folder("a", "launch.max_hours=3", "checkpoint.keep_last=5")
    assert folder("a") != folder("b")
    assert folder("a") != folder("a", "seed=1")


def test_a_run_directory_knows_the_same_job_again_whose_data_came_with_a_later_launch(tmp_path, monkeypatch):
    """Each launch has a folder of its own there, in which the job is started and its data lies."""
    data = tmp_path / "mine.jsonl"
    data.write_text('{"messages": []}\n')
    found = []
    for name in ("loadmaster-x", "loadmaster-y"):
        for file, content in unpacked(ordered("data=file", f"data.path={data}", name=name)).items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        monkeypatch.chdir(tmp_path / name)
        found.append(Pipeline(compose([], str(tmp_path / name), "job"), Console(), None, None).run_dir.identity)
    assert found[0] == found[1]


def test_an_order_is_the_same_each_time_and_each_variable_fits_in_one():
    made = ordered()
    assert made == ordered()
    assert all(len(value) < 128 << 10 for value in made.env.values())
    assert len(shlex.split(made.arguments)) == 3


def test_the_deadline_is_what_hours_and_dollars_allow():
    def hours(*words):
        job = json.loads(ordered(*words).env["LOADMASTER_JOB"])
        assert job["deadline"] == pytest.approx(1_000_000 + job["max_hours"] * 3600, abs=0.5)
        return job["max_hours"]

    planned = choices(composed().job, OFFERS, 200_000)[0].hours
    assert hours() == pytest.approx(2 * planned + 1, abs=1e-3)
    assert hours("launch.max_hours=3") == 3
    assert hours("launch.max_hours=3", "launch.max_usd=1.98") == 2
    choice = choices(composed().job, OFFERS, 200_000)[0]
    unknown = replace(choice, plan=replace(choice.plan, hours=None))
    assert order.deadline_hours(composed().job.launch, unknown) == 24


def test_hours_count_from_when_the_machine_is_asked_for():
    made = ordered("launch.max_hours=3")
    later = order.dated(made, 1_007_200.0)
    assert later.job == made.job | {"deadline": 1_007_200 + 3 * 3600}
    assert replace(later, env=made.env) == made


@pytest.mark.parametrize(("hours", "told_s"), [("3", 120 + 60), ("0.1", 36)])
def test_a_job_hears_of_its_end_in_time_for_a_checkpoint_and_in_the_last_tenth_of_its_hours(hours, told_s):
    assert ordered(f"launch.max_hours={hours}").job["stop_before_s"] == pytest.approx(told_s)


def test_a_cluster_is_ended_as_one_and_what_is_rented_apart_pod_by_pod():
    cases = [(1, False), (1, True), (2, False), (2, True)]
    assert [order.ended_by(nodes, plain) for nodes, plain in cases] == ["pod", "pod", "cluster", "pod"]


def test_disks_hold_the_image_the_run_and_two_copies_of_the_weights():
    job = composed().job
    choice = choices(job, OFFERS, 200_000)[0]
    needed = choice.plan.disk_gib * 2**30 + 2 * 2 * choice.plan.model.parameters
    size = order.volume_gb(job.launch, choice)
    assert needed <= size * 1e9 < needed + 1.1e9
    for disk_gib, limit in ((0, 10), (1e6, 4096)):
        model = replace(choice.plan.model, parameters=1)
        other = replace(choice, plan=replace(choice.plan, disk_gib=disk_gib, model=model))
        assert order.volume_gb(job.launch, other) == limit
    assert order.disk_gb(job.launch, choice) == 50
    assert order.disk_gb(replace(job.launch, volume=None), choice) == 50 + size
    given = replace(job.launch, volume=None, volume_gb=70)
    assert (order.volume_gb(given, choice), order.disk_gb(given, choice)) == (70, 120)
    assert order.disk_gb(replace(given, disk_gb=60), choice) == 60


def test_on_one_machine_the_job_starts_its_own_processes_and_on_several_torchrun_does():
    stages = ["-m", "loadmaster.cli", "export", "--config-dir", "/f", "--config-name", "job", "run_dir=/r"]
    (two,) = choices(composed("launch.gpus=['l40s:2']").job, OFFERS, 200_000)
    assert order.command("export", two, "/f", "/r") == ["python3", *stages]
    cluster = replace(two, offer=replace(two.offer, nodes=2))
    assert order.command("export", cluster, "/f", "/r") == ["python3", "/f/torchrun.py", *stages]


# --------------------------------------------------------------- reading the log


def line(number: int, text: str, at: str = "2026-11-24T10:00:00Z") -> LogLine:
    return LogLine(f"{at}/{number:012d}", at, text)


def test_lines_that_come_again_are_taken_once_and_marks_of_others_are_text():
    reader = Reader()
    assert reader.take(line(1, "hello")) == "hello"
    assert reader.take(line(1, "hello")) is None
    assert reader.take(line(2, "hello")) == "hello"
    assert reader.take(line(3, "::loadmaster not json")) == "::loadmaster not json"
    assert reader.take(line(4, '::loadmaster {"event": "armed"}')) == {"event": "armed"}
    assert reader.armed and reader.newest == "2026-11-24T10:00:00Z"
    of_the_job = '{"event": "end", "exit_code": 0}'
    assert reader.take(line(5, of_the_job, "2026-11-24T09:59:59Z")) == of_the_job and reader.ended is None
    assert reader.newest == "2026-11-24T10:00:00Z" and reader.files() is None


@pytest.mark.parametrize("lost", [None, 0, 1, "damaged"])
def test_files_are_whole_or_not_there(lost, tmp_path):
    packed = base64.b64decode(payload.tar({"result.json": b"{}", "export/fp8/manifest.json": b"[]"}))
    text = base64.b64encode(packed).decode()
    halves = [text[:40], text[40:]]
    reader = Reader()
    for number, half in enumerate(halves):
        if number != lost:
            data = half if lost != "damaged" else half[::-1]
            reader.take(line(number, f"::loadmaster {json.dumps({'event': 'file', 'part': number, 'data': data})}"))
    digest = hashlib.sha256(packed).hexdigest()
    reader.take(line(9, f"::loadmaster {json.dumps({'event': 'end', 'exit_code': 0, 'parts': 2, 'sha256': digest})}"))
    if lost is not None:
        assert reader.files() is None
        return
    assert sorted(unpack(reader.files(), tmp_path)) == ["export/fp8/manifest.json", "result.json"]
    assert (tmp_path / "export" / "fp8" / "manifest.json").read_text() == "[]"


def test_of_what_a_machine_hands_back_only_a_runs_small_files_are_taken(tmp_path):
    """It could else rewrite launch.json, which says which host the export is copied from, or fill the disk."""
    folder, buffer = tmp_path / "inside", io.BytesIO()
    folder.mkdir()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("../outside", "/result.json", "launch.json", "checkpoints/step-1/a", "plan.json"):
            archive.addfile(tarfile.TarInfo(name))
        for name, kind in (("result.json", tarfile.SYMTYPE), ("eval.json", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "plan.json"
            archive.addfile(link)
        bomb = tarfile.TarInfo("report.html")
        bomb.size = 17 << 20
        archive.addfile(bomb, io.BytesIO(bytes(bomb.size)))
    assert unpack(buffer.getvalue(), folder) == ["plan.json"]
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("inside/plan.json")]


def test_references_to_secrets_are_the_only_trace_of_them():
    made = ordered("launch.secrets.HF_TOKEN=my_hf")
    assert made.secrets == {"HF_TOKEN": "my_hf"} and "HF_TOKEN" not in made.env
    (request,) = rental.requests("", made)
    assert request["body"]["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_my_hf }}"
    assert json.loads(made.env["LOADMASTER_JOB"])["secrets"] == ["HF_TOKEN"]
    assert not re.search("RUNPOD_API_KEY", json.dumps(made.env | {"LOADMASTER_BOOTSTRAP": ""}))


@pytest.mark.parametrize("where", [["launch=runpod"], ["launch=ssh", "launch.hosts=[a]"], ["launch=slurm"]])
def test_rows_that_cannot_be_trained_on_are_told_before_anything_is_rented(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def launched(*words: str) -> None:
        job.launch_job(compose(["recipe=qlora_8b", "data=file", *where, *words]), Console(quiet=True))

    for words, said in (
        (["data.path=bad.jsonl"], r"broken JSON.*bad\.jsonl:2"),
        (["data.path=[good.jsonl,bad.jsonl]"], r"1 of 5 rows.*\n.*bad\.jsonl:2"),
        (["data.path=good.jsonl", "data.validation=bad.jsonl"], r"bad\.jsonl:2"),
        (["data.path=pairs.jsonl"], r"a preference row(.|\n)*objective=dpo"),
    ):
        with pytest.raises(DataError, match=said):
            launched(*words)
    assert not (tmp_path / "runs").exists()
    refuse_bad_rows(compose(["data=file", "data.path=bad.jsonl", "data.on_bad_row=skip"]).job)
    refuse_bad_rows(compose(["data=file", "data.path=bad.jsonl", "data.max_rows=1"]).job)
    refuse_bad_rows(compose(["data=file", "data.path=somebody/data"]).job)  # on the Hub, which is asked there
    monkeypatch.setattr(prepared, "LARGE_BYTES", 10)
    said = []
    with pytest.raises(DataError):
        refuse_bad_rows(compose(["data=file", "data.path=bad.jsonl"]).job, said.append)
    assert said == ["reading 0.0 GB of data before a machine starts for them"]


def test_plain_pods_are_one_machine_that_is_not_alive_once_one_of_them_is_gone() -> None:
    made = datetime(2026, 11, 24, tzinfo=UTC)
    pods = {id: Pod(id, f"loadmaster-x-node{node}", "RUNNING", 1.5, made) for node, id in enumerate("ab")}
    client = SimpleNamespace(pod=pods.get)
    (machine,) = rental.groups([*pods.values()])
    found = rental.refresh(client, machine)
    assert (found.alive, found.members, found.usd_per_hour) == (True, ("a", "b"), 3.0)
    del pods["b"]
    found = rental.refresh(client, machine)
    assert (found.alive, found.status, found.usd_per_hour) == (False, "1 of 2 there", 1.5)
    pods.clear()
    assert rental.refresh(client, machine) is None
