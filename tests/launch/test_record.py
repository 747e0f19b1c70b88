"""Where a launch's run lies, as its record says."""

from __future__ import annotations

import pytest

from loadmaster.errors import LoadmasterError
from loadmaster.files import write_json
from loadmaster.launch.record import Left, is_deployed_from_a_volume, where


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({}, None),
        ({"volume": "vol1"}, None),
        ({"run_dir": "/workspace/x"}, None),
        ({"run_dir": "~/x", "host": "gpu1", "ssh_config": "c"}, Left(None, "~/x", "gpu1", "c")),
    ],
)
def test_a_record_says_where_a_run_lies_if_anything_was_kept(tmp_path, record, found):
    assert where(tmp_path) is None
    write_json(tmp_path / "launch.json", record)
    assert where(tmp_path) == found


@pytest.mark.parametrize(("text", "said"), [("{", "is damaged"), ("[]", "is no launch's record")])
def test_a_damaged_record_is_a_sentence(tmp_path, text, said):
    (tmp_path / "launch.json").write_text(text)
    with pytest.raises(LoadmasterError, match=f"launch.json {said}.*; start the launch again"):
        where(tmp_path)


def test_a_run_is_deployed_from_where_it_lies_only_by_an_endpoint_that_looks_for_it_there(tmp_path):
    record, endpoint = tmp_path / "launch.json", {"volume_path": "runs/x", "request": {"image": "worker"}}
    (tmp_path / "bundle").mkdir()
    write_json(tmp_path / "bundle/endpoint.json", endpoint)
    assert not is_deployed_from_a_volume(tmp_path)
    write_json(record, {"run_dir": "/workspace/x", "host": "gpu1"})
    assert not is_deployed_from_a_volume(tmp_path)
    write_json(record, {"run_dir": "/workspace/x", "volume": "vol1"})
    assert is_deployed_from_a_volume(tmp_path)
    for other in ({"request": {"image": "worker"}}, endpoint | {"request": {"image": None}}):
        write_json(tmp_path / "bundle/endpoint.json", other)
        assert not is_deployed_from_a_volume(tmp_path)
    (tmp_path / "bundle/endpoint.json").unlink()
    assert not is_deployed_from_a_volume(tmp_path)
