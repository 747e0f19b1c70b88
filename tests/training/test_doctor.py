"""What is not alike on all hosts, or not fit, is found before training and named."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from loadmaster.training.doctor import SHM_GIB, Needs, Report, differences, needs_of, slow_links
from tests.runs import ROOT
from tests.training.processes import run_ranks
from tests.training.test_loop import PLAN

SCRIPT = Path(__file__).with_name("examined.py")
SAME = {
    "code": "aaaaaaaaaa", "config": "cc", "data": "dd", "versions": {"torch": "2.13.0"}, "clock_s": 1000.0,
    "disk_free_gib": 50.0, "shm_free_gib": 8.0, "node_gb_per_s": 250.0, "next_gb_per_s": 40.0,
}


def reports(nodes=3, per_node=2, **odd):
    """Ranks that are alike; odd: rank -> what is different there."""
    made = [Report(rank, rank // per_node, f"gpu{rank // per_node}", **SAME) for rank in range(nodes * per_node)]
    return [dataclasses.replace(r, **odd.get(f"rank{r.rank}", {})) for r in made]


@pytest.mark.parametrize(
    ("gpu", "count", "shm"), [("h100_80gb", 2, SHM_GIB), ("NVIDIA RTX 7777", 2, SHM_GIB), ("a40", 1, 0), ("cpu", 2, 0)]
)
def test_several_gpus_need_shared_memory_in_the_catalogue_or_not(gpu, count, shm):
    hardware = dataclasses.replace(PLAN.hardware, gpu=gpu, count=count)
    assert needs_of(dataclasses.replace(PLAN, hardware=hardware)).shm_gib == shm


def on_node_1(**values):
    return {"rank2": values, "rank3": values}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({}, []),
        (on_node_1(code="bbbbbbbbbb"), ["node 1 (gpu1): loadmaster's own files differ (bbbbbbbb, not aaaaaaaa)"]),
        ({"rank3": {"config": "xx"}}, ["node 1 (gpu1), rank 3: the job's settings differ (xx, not cc)"]),
        (on_node_1(data="xx"), ["node 1 (gpu1): the data differ (xx, not dd)"]),
        (on_node_1(versions={"torch": "2.12.0"}), ["node 1 (gpu1): torch is 2.12.0, not 2.13.0"]),
        (on_node_1(versions={}), ["node 1 (gpu1): torch is missing, not 2.13.0"]),
        (on_node_1(clock_s=1012.5), ["node 1 (gpu1): its clock is 12.5 s ahead of the usual one; start NTP there"]),
        (on_node_1(clock_s=990.0), ["node 1 (gpu1): its clock is 10.0 s behind the usual one; start NTP there"]),
        (on_node_1(clock_s=1002.0), []),
        (on_node_1(disk_free_gib=0.5), ["node 1 (gpu1): 0.5 GiB free for the run, which writes 1.0 GiB there"]),
        (on_node_1(disk_free_gib=5.0), []),
        ({"rank0": {"disk_free_gib": 5.0}}, ["node 0 (gpu0): 5.0 GiB free for the run, which writes 20.0 GiB there"]),
        (
            on_node_1(shm_free_gib=0.0625),
            [
                "node 1 (gpu1): 0.06 GiB free in /dev/shm, and its ranks want 1.0; "
                "start the container with --shm-size=8g (or --ipc=host)"
            ],
        ),
    ],
)
def test_the_node_that_is_wrong_is_named(odd, said):
    assert differences(reports(**odd), Needs(disk_gib=20.0, shm_gib=1.0)) == said


def test_of_two_that_disagree_the_lead_is_right():
    (said,) = differences(reports(2, 1, rank1={"code": "bbbbbbbbbb"}), Needs())
    assert said.startswith("node 1 (gpu1)")


@pytest.mark.parametrize(
    ("odd", "needs", "said"),
    [
        ({}, Needs(), []),
        ({}, Needs(node_gb_per_s=300, next_gb_per_s=100), []),
        (on_node_1(node_gb_per_s=20.0), Needs(node_gb_per_s=300),
         ["node 1 (gpu1): 20.0 GB/s between its GPUs, of 300.0 expected"]),
        # Without a catalogue the other nodes are the measure.
        (on_node_1(node_gb_per_s=20.0), Needs(), ["node 1 (gpu1): 20.0 GB/s between its GPUs, of 250.0 expected"]),
        (on_node_1(next_gb_per_s=5.0), Needs(),
         ["10.0 GB/s between node 1 (gpu1) and node 2 (gpu2), of 80.0 expected"]),
        # Slow to and from both neighbours: the node itself.
        ({**on_node_1(next_gb_per_s=5.0), "rank0": {"next_gb_per_s": 5.0}, "rank1": {"next_gb_per_s": 5.0}},
         Needs(next_gb_per_s=100),
         ["10.0 GB/s between node 0 (gpu0) and node 1 (gpu1), of 100.0 expected",
          "10.0 GB/s between node 1 (gpu1) and its neighbours, of 100.0 expected"]),
        (on_node_1(node_latency_us=900.0), Needs(node_latency_us=27.0),
         ["node 1 (gpu1): a message takes 900 us within it, of 27 expected"]),
        (on_node_1(next_latency_us=900.0), Needs(next_latency_us=25.0),
         ["node 1 (gpu1): a message takes 900 us to the next node, of 25 expected"]),
    ],
)
def test_a_slow_link_is_named(odd, needs, said):
    assert slow_links(reports(**odd), needs) == said


@pytest.mark.slow
def test_four_real_ranks_that_are_alike_agree(tmp_path):
    done = run_ranks(SCRIPT, str(tmp_path), size=4, local_size=2, folder=tmp_path)
    assert done.codes == [0, 0, 0, 0], done.output
    assert re.search(
        r"4 ranks on 2 nodes agree, all-reduce of one number \d+ us, [\d.]+ GB/s within a node, "
        r"[\d.]+ GB/s from node to node",
        done.output[0],
    )


@pytest.mark.slow
def test_a_real_node_with_other_code_settings_and_clock_is_named_and_nothing_starts(tmp_path):
    """Node 1 runs a copy of the package with a line more, another job, and a clock ten minutes ahead."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "loadmaster", copy / "loadmaster", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "loadmaster" / "errors.py", "a", encoding="utf-8") as file:
        file.write("\n# one line more\n")
    other = {"PYTHONPATH": f"{copy}:{ROOT}", "CONFIG": "badcafe", "CLOCK": "600"}
    each = {2: other, 3: other}
    done = run_ranks(SCRIPT, str(tmp_path), size=4, local_size=2, folder=tmp_path, each=each, fork=False)
    assert done.codes == [4, 4, 4, 4], done.output
    said = done.output[0]
    assert "1. node 1 (" in said and "loadmaster's own files differ" in said
    assert "the job's settings differ (badcafe, not c0ffee)" in said
    assert "its clock is" in said and "node 0 (" not in said.split("its clock")[0]
    assert "Traceback" not in "".join(done.output)


@pytest.mark.slow
def test_nodes_with_different_numbers_of_processes_are_refused_on_every_rank(tmp_path):
    """They used to wait for one another in the doctor, until the watchdog's half hour was over."""
    alone = {2: {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}}
    ended = run_ranks(SCRIPT, str(tmp_path), size=3, local_size=2, folder=tmp_path, each=alone)
    assert ended.codes == [4, 4, 4]
    for said in (ended.output[0], ended.output[2]):  # a line in the log of each node
        assert "2 on the node of rank 0, 1 on the node of rank 2" in said and "--nproc-per-node=N" in said


@pytest.mark.slow
def test_the_doctor_by_itself_names_a_rank_that_dies_while_it_is_looked_at(few_words, tmp_path):
    words = ["hardware=cpu", "hardware.count=2", "batch.global_size=2", f"model.path={few_words}"]
    script = tmp_path / "script.py"
    script.write_text(DIES.format(words=["doctor", *words]))
    ended = run_ranks(script, size=2, folder=tmp_path, timeout_s=150)
    assert ended.codes == [4, -9]
    assert "rank 1" in ended.output[0] and "no sign of life" in ended.output[0]
    assert "Traceback" not in ended.output[0]


DIES = """
import os, signal, sys
from loadmaster import cli
from loadmaster.training import doctor

if os.environ["RANK"] == "1":
    doctor.code_hash = lambda: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cli.main({words!r}))
"""


@pytest.mark.slow
def test_a_rank_that_goes_as_it_joins_leaves_the_others_a_sentence(tmp_path):
    """What a stop request does to a process that is between its meeting and its first word."""
    script = tmp_path / "joins.py"
    script.write_text(
        "import os, sys\n"
        "from loadmaster.errors import LoadmasterError\n"
        "from loadmaster.training import world\n"
        "if os.environ['RANK'] == '1':\n"
        "    world.World.gather = lambda self, value: os._exit(75)\n"
        "try:\n"
        "    world.join('cpu', 60)\n"
        "except LoadmasterError as error:\n"
        "    sys.exit(f'said: {error}')\n"
    )
    ended = run_ranks(script, size=2, folder=tmp_path, timeout_s=100)
    assert ended.codes == [1, 75]
    assert "said: rank 0 lost the others as they joined" in ended.output[0] and "Traceback" not in ended.output[0]
