"""Machines: the local one as it is, those of the catalogue as written, unknown names refused with the known ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from loadmaster import catalog
from loadmaster.config.compose import compose
from loadmaster.config.schema import HardwareConfig
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.preflight import hardware, make_plan, nvml
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import World
from loadmaster.world_stages import StageRun, device_type

PLAN = ["data=file", "data.path=owner/dataset", "stop_after=plan"]


def test_local_without_a_gpu_is_the_cpu_with_the_hosts_memory(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "local_gpus", lambda: [])
    here = hardware.find_hardware(HardwareConfig())
    assert here.is_cpu and 1 < here.memory_gib <= hardware._meminfo_bytes() / 2**30 and not here.has_fp8


def test_local_takes_a_known_cards_facts_from_the_catalogue(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "local_gpus", lambda: 2 * [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    here = hardware.find_hardware(HardwareConfig())
    assert (here.gpu, here.count, here.memory_gib, here.usd_per_hour) == ("h100_80gb", 2, 79.18, None)
    with pytest.raises(ConfigError, match="has 2 GPU"):
        hardware.find_hardware(HardwareConfig(count=4))


@pytest.mark.parametrize(
    ("driver_name", "gib", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 80.0, "a100_80gb"), ("NVIDIA A100 80GB PCIe", 80.0, "a100_80gb_pcie"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "a100_40gb"), ("NVIDIA A100-PCIE-40GB", 40.0, None),
        ("NVIDIA H100 80GB HBM3", 79.65, "h100_80gb"), ("NVIDIA H100 PCIe", 79.65, "h100_pcie"),
        ("NVIDIA H100 NVL", 93.58, "h100_nvl"), ("NVIDIA GH200 480GB", 95.6, None),
        ("NVIDIA L4", 22.49, "l4"), ("NVIDIA L40", 44.99, None), ("NVIDIA L40S", 44.99, "l40s"),
        ("NVIDIA A40", 44.99, "a40"), ("NVIDIA RTX A6000", 47.99, "rtx_a6000"), ("NVIDIA A10G", 22.49, "a10g"),
        ("NVIDIA RTX 6000 Ada Generation", 44.99, "rtx_6000_ada"), ("NVIDIA GeForce RTX 3090", 24.0, "rtx3090"),
        ("NVIDIA GeForce RTX 5090", 31.84, "rtx5090"), ("NVIDIA GeForce RTX 5090 Laptop GPU", 23.9, None),
    ],
)
def test_cards_are_told_apart_by_all_words_of_their_names_and_by_their_memory(driver_name, gib, known) -> None:
    assert hardware.catalog_name(driver_name, gib) == known


def test_memory_that_ecc_takes_is_not_planned_with(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA RTX 6000 Ada Generation", 44.99, 8.9)])
    assert hardware.detect_local().memory_gib == pytest.approx(44.09, abs=0.01)  # 44.43 in logs


def test_of_unlike_cards_those_like_the_first_are_planned_with(monkeypatch) -> None:
    cards = [("NVIDIA L4", 22.49, 8.9), ("NVIDIA L4", 22.49, 8.9), ("NVIDIA A40", 44.99, 8.6)]
    monkeypatch.setattr(hardware, "local_gpus", lambda: cards)
    found = [hardware.detect_local(count) for count in (1, 2, "auto")]
    assert [(here.gpu, here.count) for here in found] == [("l4", 1), ("l4", 2), ("l4", 2)]
    with pytest.raises(ConfigError, match=r"not alike: NVIDIA L4, NVIDIA L4, NVIDIA A40(.|\n)*hardware\.count=2"):
        hardware.detect_local(3)


def test_the_docs_name_every_card_of_the_catalogue() -> None:
    page = (Path(__file__).parents[2] / "docs/preflight.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in catalog.gpus())


def test_cards_of_which_there_is_no_machine_have_no_price_and_are_not_offered_elsewhere() -> None:
    a40 = hardware.from_catalog("a40", 2)
    assert a40.usd_per_hour is None and a40.known and hardware.not_offered(a40) is None
    assert {machine.gpu for machine in hardware.rentable()} == {machine["gpu"] for machine in catalog.machines()}


def test_host_memory_that_is_not_known_is_not_planned_with() -> None:
    def plan(gpu: str, *words: str):
        return make_plan(compose(["recipe=full_8b", f"hardware.gpu={gpu}", "optimizer.name=adamw", *words, *PLAN]).job)

    known, unknown = plan("a100_80gb", "offload=optimizer"), plan("a100_80gb_pcie")
    assert not known.fits and known.host_memory_gib > 117
    assert not unknown.fits and unknown.offload == "none"
    assert plan("a100_80gb_pcie", "offload=optimizer").fits  # as it was written


def test_an_unknown_card_is_planned_for_memory_and_not_for_speed(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA RTX 7777", 48.0, 12.0)])
    here = hardware.detect_local()
    assert here.gpu == "NVIDIA RTX 7777" and not here.known and 47 < here.memory_gib < 48


def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_train_on_the_processors(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    with pytest.raises(LoadmasterError, match=r"\(NVIDIA H100 80GB HBM3\) that PyTorch cannot use: .* hardware=cpu"):
        device_type(SimpleNamespace(hardware=SimpleNamespace(gpu="h100_80gb")), "local")
    assert device_type(SimpleNamespace(hardware=SimpleNamespace(gpu="cpu")), "local") == "cpu"
    monkeypatch.setattr(hardware, "local_gpus", lambda: [])
    assert device_type(SimpleNamespace(hardware=SimpleNamespace(gpu="h100_80gb")), "local") == "cpu"


def test_of_processes_that_met_before_there_was_a_plan_all_refuse_it(tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    monkeypatch.setattr(World, "gather", lambda self, mine: ["", mine] if isinstance(mine, str) else [mine])
    (tmp_path / "plan.json").touch()
    hardware_of = SimpleNamespace(hardware=SimpleNamespace(gpu="h100_80gb"))
    job = SimpleNamespace(hardware=SimpleNamespace(gpu="local"), launch=SimpleNamespace(hang_timeout_s="auto"))
    stage = StageRun(job, hardware_of, tmp_path, World(0, 2), StopSignal(), None, None)
    with pytest.raises(LoadmasterError, match=r"rank 1: this machine has a GPU .* that PyTorch cannot use"):
        stage.run("train")


def test_a_gpu_that_the_plan_did_not_see_is_no_reason_either(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(hardware, "local_gpus", lambda: [])
    plan = SimpleNamespace(hardware=SimpleNamespace(gpu="cpu"))
    with pytest.raises(LoadmasterError, match=r"H100 80GB HBM3.* libnvidia-ml\.so\.1, was not .*hardware=cpu"):
        device_type(plan, "local")
    assert device_type(plan, "cpu") == "cpu"


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("", []), ("-1", []),
        ("0,-1,2", [0]), ("0,7,1", [0]), ("0,0", []), ("GPU-bb", [1]), (" GPU-ca2 , GPU-aa", [2, 0]), ("GPU-", []),
        ("GPU-dd,GPU-aa", []), ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_those_that_cuda_shows(chosen, seen) -> None:
    assert nvml.visible(chosen, ["GPU-aa1", "GPU-bb1", "GPU-ca2"]) == seen


class Driver:
    """Of two unlike cards, and of a part of the second one."""

    CARDS = (("NVIDIA L4", "GPU-aa", 24, 8, 9), ("NVIDIA A100-SXM4-80GB", "GPU-bb", 80, 8, 0))
    PART = ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "MIG-cc", 10, 0, 0)

    def __getattr__(self, name):
        return lambda *_: 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        device._obj.value = 3
        return 0 if uuid.startswith(b"MIG-cc") else 2

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device, whole):
        whole._obj.value = 2
        return 0 if device.value == 3 else 2

    def _of(self, device):
        return [*self.CARDS, self.PART][device.value - 1]

    def nvmlDeviceGetName(self, device, name, _):
        name.value = self._of(device)[0].encode()

    def nvmlDeviceGetUUID(self, device, uuid, _):
        uuid.value = self._of(device)[1].encode()

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        memory._obj.total = self._of(device)[2] << 30
        return 0 if memory._obj.total else 3  # NVML_ERROR_NOT_SUPPORTED

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = self._of(device)[3:]


@pytest.mark.parametrize(
    ("chosen", "name", "gib", "capability"),
    [
        ("GPU-b", "NVIDIA A100-SXM4-80GB", 80, 8.0), ("MIG-cc", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10, 8.0),
        ("MIG-cc,MIG-cc2", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10, 8.0),
    ],
)
def test_a_card_or_a_part_of_one_that_is_chosen_by_uuid_is_planned_for(monkeypatch, chosen, name, gib, capability):
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Driver())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert nvml.local_gpus() == [(name, gib, capability)]


@pytest.mark.parametrize(("chosen", "gib"), [("1", [10]), (None, [24])])
def test_of_a_gpu_that_is_divided_the_first_part_is_planned_for_where_no_whole_one_is_shown(monkeypatch, chosen, gib):
    class Divided(Driver):
        def nvmlDeviceGetMigMode(self, device, now, later):
            now._obj.value = device.value == 2
            return 0

        def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index, part):
            part._obj.value = 3
            return 0 if index == 2 else 6  # NVML_ERROR_NOT_FOUND

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Divided())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [memory for _, memory, _ in nvml.local_gpus()] == gib


def test_a_card_whose_memory_the_driver_does_not_tell_is_none(monkeypatch):
    monkeypatch.setattr(Driver, "CARDS", (("NVIDIA GB10", "GPU-aa", 0, 12, 1), Driver.CARDS[1]))
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Driver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvml.local_gpus() == [("NVIDIA A100-SXM4-80GB", 80, 8.0)]


def test_catalogue_machines_have_memory_price_and_capability() -> None:
    node = hardware.find_hardware(HardwareConfig(gpu="h100_80gb", count=8, nodes=2))
    assert node.world_size == 16 and node.usd_per_hour == pytest.approx(16 * 3.99) and node.has_fp8
    assert not hardware.from_catalog("a100_80gb", 1).has_fp8


def test_a_machine_that_nobody_rents_is_planned_and_said_to_be_none() -> None:
    said = hardware.not_offered(hardware.from_catalog("l40s", 8, 2))
    assert "no 2 nodes of 8x l40s to rent: l40s comes as 1, 2, 4 or 8 GPUs of one node" in said
    assert "3x h100_80gb" in hardware.not_offered(hardware.from_catalog("h100_80gb", 3))
    assert hardware.not_offered(hardware.from_catalog("h100_80gb", 4, 2)) is not None
    assert all(hardware.not_offered(machine) is None for machine in hardware.rentable())
    own = hardware.priced(hardware.from_catalog("h100_80gb", 3), {"h100_80gb": 2.0})
    assert hardware.not_offered(own) is None


def test_a_price_of_other_peoples_hosts_is_marked_until_another_is_known(tmp_path, monkeypatch) -> None:
    assert hardware.from_catalog("rtx4090", 1).price_note.endswith("2026-03-31 (community hosts)")
    assert "community" not in hardware.from_catalog("h100_80gb", 1).price_note
    own = tmp_path / "prices.yaml"
    own.write_text("{date: 2026-12-01, source: mine, gpus: {rtx4090: {pod_usd_per_hour: 0.69, date: 2026-12-01}}}")
    monkeypatch.setenv("LOADMASTER_PRICES", str(own))
    assert hardware.from_catalog("rtx4090", 1).price_note.endswith("list price of 2026-12-01")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="a100_80gb"):
        hardware.find_hardware(HardwareConfig(gpu="h100"))


def test_cpu_processes_share_the_machines_memory_and_threads() -> None:
    one, four = hardware.cpu(), hardware.find_hardware(HardwareConfig(gpu="cpu", count=4))
    assert (four.world_size, four.label) == (4, "4 CPU processes") and four.host_memory_gib == one.host_memory_gib
    assert four.memory_gib == pytest.approx(one.memory_gib / 4)
    assert four.tflops["fp32"] == pytest.approx(one.tflops["fp32"] / 4)


def test_a_count_of_gpus_on_a_machine_without_one_is_refused_not_taken_for_processors(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "local_gpus", lambda: [])
    with pytest.raises(ConfigError, match=r"hardware\.gpu=cpu hardware\.count=2"):
        hardware.find_hardware(HardwareConfig(count=2))
