"""Between the stages that all run together the lead is alone, and the others wait for it: not longer than it lives."""

from pathlib import Path

import pytest

from tests.training.processes import run_ranks

SCRIPT = Path(__file__).with_name("following.py")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "unfinished"), [("stop", (0,)), ("kill", ())])
def test_a_lead_that_is_gone_ends_its_followers_who_say_so(tmp_path, how, unfinished):
    done = run_ranks(SCRIPT, how, size=2, local_size=1, folder=tmp_path, unfinished=unfinished)
    assert done.codes[1] == 4, done.output
    assert "rank 0) has given no sign of life" in done.output[1]
    assert "Traceback" not in done.output[1] and "terminate called" not in done.output[1]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 5])
def test_followers_end_with_the_lead_s_exit_code(tmp_path, code):
    done = run_ranks(SCRIPT, str(code), size=2, local_size=1, folder=tmp_path)
    assert done.codes == [code, code], done.output
    assert done.output == ["", ""]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path):
    done = run_ranks(SCRIPT, "absent", size=3, folder=tmp_path)
    assert done.codes == [4, 4, 0], done.output
    assert "not all of 3 processes came to 127.0.0.1:" in done.output[0] and "missing: rank 2" in done.output[0]
