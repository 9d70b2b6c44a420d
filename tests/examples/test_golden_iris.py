import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def printed():
    """What the example prints, run as a user does."""
    done = subprocess.run([sys.executable, "examples/golden_iris.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return done.stdout


def test_the_golden_model_equals_the_int8_network_in_every_integer(printed):
    part = printed.partition("\n2.")[0]
    right = re.search(r"(\d+) flowers classified right in float, (\d+) in int8", part)
    assert right is not None
    assert min(map(int, right.groups())) > 140
    assert re.findall(r"^ +(fc[12]\.\S+) .* (\d+) of (\d+)$", part, re.MULTILINE) == [
        ("fc1.x_q", "0", "600"),
        *((f"fc1.{step}", "0", "2400") for step in ("acc", "acc+bias", "y_q")),
        ("fc2.x_q", "0", "2400"),
        *((f"fc2.{step}", "0", "450") for step in ("acc", "acc+bias", "y")),
    ]
    assert set(re.findall(r"(\d+) outputs differ", part)) <= {"0"}


def test_saturated_pairs_explain_every_difference_of_torchs_engines(printed):
    if "needs an x86" in printed or "no torch.ao" in printed:
        pytest.skip("no engine to compare with")
    off = r"(\d+ off by up to \d+ units)\s+0 off$"
    assert len(re.findall(rf"^ +(?:fbgemm|onednn)\s+AVX2 only\s+{off}", printed, re.MULTILINE)) == 2
    assert re.search(r"Its other \d+ channels hold no such pair, and 0 of them are off", printed)
    assert re.search(r"outputs for all flowers \d+ hold one; of the rest 0 are off", printed)
    units = [int(row) for row in re.findall(r"held at -?327.*?(\d+)$", printed, re.MULTILINE)]
    assert max(units) >= 5
    assert re.search(r"clamped at the\s+zero point 128 already: \d+ off", printed)
    assert re.search(r"both engines add it in float: \d+ off( by up to 1 units)?$", printed, re.MULTILINE)
