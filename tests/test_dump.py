"""The text of a graph: exact, deterministic, without memory addresses; and the folder that dumps go to."""

import copy
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxq
from fxq import dump, qdq
from fxq.graph import propagate
from fxq.quantized import QuantizedModule
from passes import CONVERT, PREPARE


@pytest.fixture
def qmodel() -> QuantizedModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    return fxq.quantize(model, torch.linspace(-1, 1, 32).reshape(8, 4), recipe=fxq.Recipe(observer="min_max"))


@pytest.fixture
def pair() -> GraphModule:
    """relu(x + 1) through integers and back, with values, scale and zero point."""
    graph = torch.fx.Graph()
    x, one = graph.placeholder("x"), graph.get_attr("one")
    y = graph.call_function(torch.relu, (graph.call_function(operator.add, (x, one)),))
    q = graph.create_node("call_function", qdq.quantize, (y, 1 / 32, 125), name="q")
    q.meta["qparams"] = (1 / 32, 125)
    graph.output({"y": graph.create_node("call_function", qdq.dequantize, (q, 1 / 32, 125), name="dq")})
    root = nn.Module()
    root.register_buffer("one", torch.tensor(1.0))
    gm = GraphModule(root, graph)
    propagate(gm, (torch.zeros(2, 8),), {})
    return gm


def test_the_whole_text(pair):
    assert dump.text(pair, "after lower") == (
        "# after lower\n"
        "%x : float32[2, 8] = input x\n"
        "%one : float32[] = constant one                         # 1\n"
        "%add : float32[2, 8] = add(%x, %one)\n"
        "%relu : float32[2, 8] = relu(%add)\n"
        "%q : uint8[2, 8] = fxq.quantize(%relu, 0.03125, 125)    # 0.03125, 125\n"
        "%dq : float32[2, 8] = fxq.dequantize(%q, 0.03125, 125)\n"
        "return {'y': %dq}\n"
    )


def test_the_whole_neighbourhood(pair):
    (node,) = pair.graph.find_nodes(op="call_function", target=qdq.quantize)
    assert dump.neighbourhood(pair, node) == (
        "  %relu : float32[2, 8] = relu(%add)\n"
        "> %q : uint8[2, 8] = fxq.quantize(%relu, 0.03125, 125)    # 0.03125, 125\n"
        "  %dq : float32[2, 8] = fxq.dequantize(%q, 0.03125, 125)"
    )


def test_a_graph_that_was_never_run_has_no_values():
    graph = torch.fx.Graph()
    x, inner = graph.placeholder("x"), graph.get_attr("inner")
    graph.output((x, inner))
    gm = GraphModule({"inner": torch.fx.symbolic_trace(nn.ReLU())}, graph)
    assert dump.text(gm) == "%x = input x\n%inner = constant inner\nreturn (%x, %inner)\n"


def test_long_lists_are_cut_short():
    graph = torch.fx.Graph()
    x = graph.placeholder("x", default_value=tuple(range(400)))
    parts = graph.call_function(torch.unbind, (x,), {"dim": 0})
    graph.output([graph.call_function(operator.getitem, (parts, i)) for i in range(400)])
    gm = GraphModule(nn.Module(), graph)
    propagate(gm, (torch.zeros(400, 1),), {})
    lines = dump.text(gm).splitlines()
    assert max(map(len, lines)) < 2 * dump.LONGEST
    assert [line for line in lines if " ..." in line] == [lines[0], lines[1], lines[-1]]


def test_a_chain_shows_its_layers(qmodel):
    text = dump.text(qmodel, "after prune")
    lines = text.splitlines()
    assert lines[0] == "# after prune"
    assert lines[1] == "%input_1 : float32[8, 4] = input input"
    (call,) = [i for i, line in enumerate(lines) if "fxq.qchain_float(" in line]
    assert lines[call].startswith("%_2_qchain_float : float32[8, 2] = fxq.qchain_float(%input_1, %chain)")
    inner = lines[call + 1 : call + 4]
    assert inner[0] == "    # quantize: quantize 0.00784, 127"
    assert inner[1].startswith("    # _0_qlinear: qlinear 4 -> 8, ")
    assert inner[2] == "    # _2_qlinear_float: qlinear_float 8 -> 2"
    assert lines[-1].startswith("return ")


def test_scale_zero_point_shape_and_origin_stand_on_each_line(qmodel):
    expanded = fxq.expand(qmodel)
    (line,) = [line for line in dump.text(expanded).splitlines() if "fxq.quantize(" in line]
    assert line.startswith("%quantize : uint8[8, 4] = fxq.quantize(%input")
    assert "0.00784314, 127" in line.partition("#")[2]
    (line,) = [line for line in dump.text(expanded).splitlines() if "fxq.qlinear(" in line]
    assert line.startswith("%_0_qlinear : uint8[8, 8] = fxq.qlinear(%quantize, %_0_weight_packed, ")
    assert "  0" in line.partition("#")[2], "the user's module path"


def test_no_memory_addresses_and_the_same_in_another_process(qmodel):
    program = (
        "import torch, fxq, fxq.dump\n"
        "torch.manual_seed(0)\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()\n"
        "q = fxq.quantize(m, torch.linspace(-1, 1, 32).reshape(8, 4), recipe=fxq.Recipe(observer='min_max'))\n"
        "print(fxq.dump.text(q), end='')\n"
    )
    other = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout == dump.text(qmodel)
    assert "0x" not in other.stdout


def test_observers_show_what_they_have_seen():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    prepared = fxq.prepare(model, torch.tensor([[-1.0, 2.0]]))
    assert "no data yet" in dump.text(prepared), "the examples are not calibration data"
    fxq.calibrate(prepared, [torch.tensor([[-3.0, 5.0]])])
    assert "-3..5" in dump.text(prepared)


def test_neighbourhood_marks_the_node(qmodel):
    expanded = fxq.expand(qmodel)
    node = next(n for n in expanded.graph.nodes if n.name == "_0_qlinear")
    lines = dump.neighbourhood(expanded, node).splitlines()
    assert [line for line in lines if line.startswith("> ")] == [line for line in lines if "%_0_qlinear :" in line]
    assert any("%quantize :" in line for line in lines)
    assert any("%_2_qlinear_float :" in line for line in lines)


def test_neighbourhood_marks_a_chain_once(qmodel):
    (node,) = [n for n in qmodel.graph.nodes if "inside" in n.meta]
    lines = dump.neighbourhood(qmodel, node).splitlines()
    assert [line.startswith("> ") for line in lines] == ["%_2_qchain_float :" in line for line in lines]
    assert sum(line.startswith("      # ") for line in lines) == 3


def test_folder_writes_numbered_texts_diffs_and_dots(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    (tmp_path / "99-old.txt").write_text("stale")
    (tmp_path / "mine.txt").write_text("the user's")
    fxq.quantize(model, torch.randn(4, 4), dump=tmp_path, on_low_sqnr="ignore")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "99-old.txt" not in names, "a dump of an earlier run misleads"
    assert (tmp_path / "mine.txt").read_text() == "the user's"
    texts = [name for name in names if name.endswith(".txt") and name[0].isdigit()]
    expected = ["00-trace.txt", *(f"{i:02}-{step.name}.txt" for i, step in enumerate((*PREPARE, *CONVERT), 1))]
    assert texts == expected
    assert {name.removesuffix(".txt") for name in texts[1:]} == {n.removesuffix(".diff") for n in names if ".diff" in n}
    assert {name.removesuffix(".txt") for name in texts} == {n.removesuffix(".dot") for n in names if ".dot" in n}
    assert "-" in (tmp_path / "03-normalize-moves.diff").read_text()
    assert "int8" in (tmp_path / "report.txt").read_text()


def test_folder_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(fxq.FileError, match=r"cannot be used.*give a folder"):
        fxq.quantize(nn.Linear(2, 2).eval(), torch.randn(2, 2), dump=path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that not even root can write")
def test_folder_that_cannot_be_written():
    with pytest.raises(fxq.FileError, match=r"dump='/proc/self' cannot be used.*give a folder"):
        dump.Folder("/proc/self", lambda gm, stem: None)


def test_diff_against_the_pass_before(pair, tmp_path):
    rendered = []
    folder = dump.Folder(tmp_path, lambda gm, stem: rendered.append(stem.name))
    folder.write(pair, "trace", "FLOAT")
    (relu,) = pair.graph.find_nodes(op="call_function", target=torch.relu)
    relu.replace_all_uses_with(relu.args[0])
    pair.graph.erase_node(relu)
    folder.write(pair, "drop", "FLOAT")
    assert rendered == ["00-trace", "01-drop"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00-trace.txt", "01-drop.diff", "01-drop.txt"]
    assert (tmp_path / "01-drop.txt").read_text() == dump.text(pair, "drop: FLOAT")
    delta = (tmp_path / "01-drop.diff").read_text().splitlines()
    assert delta[:2] == ["--- before", "+++ after drop"]
    assert "-%relu : float32[2, 8] = relu(%add)" in delta
    assert any(line.startswith("+%q : uint8[2, 8] = fxq.quantize(%add, 0.03125, 125)") for line in delta)


@pytest.mark.parametrize(("name", "file"), [("my.pass", "00-my-pass.txt"), ("a/b: c", "00-a-b-c.txt")])
def test_any_pass_name_is_a_file_that_a_later_run_removes(pair, tmp_path, name, file):
    dump.Folder(tmp_path, lambda gm, stem: None).write(pair, name, "FLOAT")
    assert (tmp_path / file).read_text().startswith(f"# {name}: FLOAT\n")
    dump.Folder(tmp_path, lambda gm, stem: None)
    assert list(tmp_path.iterdir()) == []


def test_folder_can_be_copied_with_its_context(tmp_path):
    folder = dump.Folder(tmp_path, lambda gm, stem: None)
    assert copy.deepcopy(folder).path == folder.path
