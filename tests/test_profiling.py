"""Costs of operations, kept in a file, and profiles of whole graphs beside them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.cli import main
from fxq.costs import Costs, costs_path, key_of
from fxq.graph import is_call
from fxq.inputs import as_call
from fxq.profiling import predict


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    fxq.kernels.info()  # the kernels come from the usual one
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))


@pytest.fixture
def qmodel():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Softmax(-1)).eval()
    return fxq.quantize(model, torch.randn(64, 16))


def test_a_profile_lists_the_operations_in_order(qmodel):
    profile = fxq.profile(qmodel, torch.randn(4, 16))
    assert [timing.op for timing in profile.timings] == ["fxq.qchain_float", "Softmax"]
    assert all(timing.measured > 0 and timing.predicted > 0 for timing in profile.timings)
    assert profile.seconds > 0
    assert "fxq.qchain_float" in str(profile)
    assert json.loads(json.dumps(profile.to_dict()))["timings"][1]["module"] == "3"


def test_a_profile_of_a_float_graph(tmp_path):
    gm = fxq.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4))
    assert len(fxq.profile(gm, torch.randn(2, 4)).timings) == 2


def test_what_works_in_place_leaves_the_inputs_alone(model_of):
    gm = fxq.trace(model_of(lambda self, x: self.l(x.mul_(2)) + x.sum(), l=nn.Linear(4, 4)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    before = x.clone()
    timings = fxq.profile(gm, x).timings
    assert torch.equal(x, before)
    assert all(timing.predicted > 0 for timing in timings)


def test_costs_are_measured_once_and_kept(qmodel, monkeypatch):
    x = torch.randn(4, 16)
    fxq.profile(qmodel, x)
    kept = json.loads(costs_path().read_text())
    assert any(key.startswith("fxq.qchain_float(float32[4, 16], ") for key in kept["seconds"])
    monkeypatch.setattr("fxq.profiling._price", lambda *_: pytest.fail("measured again"))
    fxq.profile(qmodel, x)


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    first, second = Costs(tmp_path / "c.json"), Costs(tmp_path / "c.json")
    first.of("a", lambda: 1.0)
    second.of("b", lambda: 1.0)
    first.save()
    second.save()
    assert set(Costs(tmp_path / "c.json").seconds) == {"a", "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": 3}', '{"seconds": {"a": "soon"}}'])
def test_a_damaged_file_says_so(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(fxq.FileError, match=r"c\.json is not a file of costs.*delete it"):
        Costs(tmp_path / "c.json")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    costs = Costs(tmp_path / "c.json")
    costs.of("a", lambda: 1.0)
    costs.path = tmp_path / "file" / "c.json"
    with pytest.raises(fxq.FileError, match="set FXQ_CACHE"):
        costs.save()


def test_a_key_holds_what_shapes_the_work(model_of):
    def forward(self, x):
        return F.softmax(x.transpose(0, 1), -1) * 0.5

    gm = fxq.trace(model_of(forward), torch.randn(2, 4))
    keys = {node.name: node for node in gm.graph.nodes if is_call(node)}
    x = torch.randn(2, 4)
    softmax = next(node for node in keys.values() if "softmax" in node.name)
    assert key_of(gm, softmax, (x,), {"dim": -1}) == "softmax(float32[2, 4], -1)"
    assert key_of(gm, softmax, (x.t(),), {}) == "softmax(float32[4, 2]/[1, 4])"
    mul = next(node for node in keys.values() if "mul" in node.name)
    assert key_of(gm, mul, (x, 0.5), {}) == key_of(gm, mul, (x, 0.25), {})


def test_zero_points_are_no_part_of_a_key(qmodel):
    gm = fxq.expand(qmodel)
    (node,) = [node for node in gm.graph.nodes if str(node.target) == "fxq.qlinear.default"]
    x, w, b, m = torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), torch.zeros(1)
    assert key_of(gm, node, (x, w, b, m, 3, 3, 255), {}) == key_of(gm, node, (x, w, b, m, 7, 0, 9), {})


def test_layers_of_one_kind_share_a_key():
    """One slow moment of the machine is then one timing of many."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that no two layers have the same zero points
    x = torch.randn(4, 6, 16)
    costs = Costs()
    predict(fxq.expand(fxq.quantize(model, x)), as_call(x), costs)
    for op in ("fxq.qattention(", "fxq.qlinear(uint8[6, 4, 16]", "fxq.norm("):
        assert sum(key.startswith(op) for key in costs.seconds) == 1


def test_not_a_graph():
    with pytest.raises(fxq.InputError, match=r"fxq\.profile takes what.*not a Linear"):
        fxq.profile(nn.Linear(2, 2), torch.randn(1, 2))


def test_the_command_line_shows_and_clears(qmodel, capsys):
    fxq.profile(qmodel, torch.randn(4, 16))
    assert main(["costs"]) == 0
    assert "us  fxq.qchain_float(" in capsys.readouterr().out
    assert main(["costs", "--clear"]) == 0
    assert not costs_path().exists()


def test_the_command_line_says_why_it_cannot_clear(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path / "file"))
    assert main(["costs", "--clear"]) == 1
    assert "fxq: cannot delete" in capsys.readouterr().err


def test_a_picture_by_time(qmodel, tmp_path):
    profile = fxq.profile(qmodel, torch.randn(4, 16))
    text = fxq.draw(qmodel, tmp_path / "a.dot", profile=profile).read_text()
    assert "us, " in text
    assert "#ff5f5f" in text
    other = fxq.quantize(nn.Linear(4, 4).eval(), torch.randn(8, 4))
    with pytest.raises(fxq.InputError, match="which this graph does not have"):
        fxq.draw(other, tmp_path / "b.dot", profile=profile)


def test_what_stands_beside_an_operation_is_a_part_of_its_key():
    x = torch.randn(1, 600)
    few = fxq.profile(fxq.trace(nn.Linear(600, 600).eval(), x), x)
    many = fxq.profile(fxq.trace(nn.Sequential(*[nn.Linear(600, 600)] * 24).eval(), x), x)
    assert len(few.timings) == 1 and len(many.timings) == 24
    keys = json.loads(costs_path().read_text())["seconds"]
    assert sorted(key.partition(" among ")[2] for key in keys) == ["1 MB", "1 MB and many operations"]
