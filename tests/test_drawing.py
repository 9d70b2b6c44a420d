"""Pictures and the networkx graph."""

import shutil

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.drawing import COLOURS, draw, islands, to_networkx
from fxq.quantized import QuantizedModule

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


class TwoIslands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), -1))


@pytest.fixture(scope="module")
def qmodel() -> QuantizedModule:
    torch.manual_seed(0)
    return fxq.quantize(TwoIslands().eval(), torch.randn(16, 4), on_low_sqnr="ignore")


def test_networkx_has_the_attributes(qmodel):
    graph = to_networkx(fxq.expand(qmodel))
    assert nx.is_directed_acyclic_graph(graph)
    node = graph.nodes["a_0_qlinear"]
    assert node["target"] == "fxq.qlinear"
    assert node["form"] == "int8"
    assert node["module"] == "a.0"
    assert (node["dtype"], node["shape"]) == ("uint8", (16, 8))
    assert node["scale"] > 0
    assert node["zero_point"] == 0, "a relu's range begins at 0"
    edge = graph.edges["a_0_qlinear", "a_2_qlinear_float"]
    assert (edge["dtype"], edge["scale"]) == ("uint8", node["scale"])
    assert graph.nodes["softmax"]["form"] == "float"
    assert {data["form"] for _, data in graph.nodes(data=True)} == {"io", "int8", "float", "border", "constant"}


def test_islands_are_the_integer_regions(qmodel):
    found = islands(fxq.expand(qmodel))
    assert found == [{"a_0_qlinear", "a_2_qlinear_float"}, {"b_qlinear_float"}]


def test_dot_text_is_deterministic_and_shows_what_flows(qmodel, tmp_path):
    first = draw(fxq.expand(qmodel), tmp_path / "a.dot").read_text()
    assert draw(fxq.expand(qmodel), tmp_path / "b.dot").read_text() == first
    sources = [line.split(" -> ")[0].strip() for line in first.splitlines() if " -> " in line and "label=" in line]
    names = [node.name for node in fxq.expand(qmodel).graph.nodes]
    assert sources == sorted(sources, key=names.index), "whatever seed strings are hashed with"
    assert "uint8[16, 8]" in first
    assert "cluster_a" in first
    assert "weight_packed" not in first
    assert "weight_packed" in draw(fxq.expand(qmodel), tmp_path / "c.dot", constants=True).read_text()


def test_a_chain_shows_its_layers(qmodel, tmp_path):
    text = draw(qmodel, tmp_path / "a.dot").read_text()
    assert "qlinear 4 -> 8" in text
    assert "qlinear_float 8 -> 8" in text


def test_inputs_that_lead_nowhere_are_left_out(tmp_path):
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            y = self.fc(x)
            return {"y": y if mask is None else y * mask}

    text = draw(fxq.trace(Optional().eval(), torch.randn(2, 4)), tmp_path / "a.dot").read_text()
    assert "label=mask" not in text
    assert "-> output" in text, "through the dict that holds it"


def test_sizes_computed_in_many_steps_are_walked_once(tmp_path):
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            a, b = x.shape
            for _ in range(60):
                a, b = a + b, a - b
            return torch.relu(x), a

    draw(fxq.trace(Sizes().eval(), torch.randn(2, 4)), tmp_path / "a.dot")  # 2**60 paths lead to the output


@needs_dot
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_pictures_are_written(qmodel, tmp_path, suffix):
    path = draw(qmodel, tmp_path / f"a.{suffix}")
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [f"a.{suffix}"]


def test_a_traced_model_is_drawn(tmp_path):
    text = draw(fxq.trace(TwoIslands().eval(), torch.randn(16, 4)), tmp_path / "a.dot").read_text()
    assert text.count("label=Linear") == 3
    assert "label=softmax" in text


@needs_dot
def test_a_picture_leaves_the_dot_text_beside_it_alone(qmodel, tmp_path):
    draw(qmodel, tmp_path / "a.dot")
    draw(qmodel, tmp_path / "a.svg")
    assert (tmp_path / "a.dot").read_text().startswith("digraph")


def test_the_legend_names_the_forms_that_are_drawn(qmodel, tmp_path):
    text = draw(fxq.expand(qmodel), tmp_path / "a.dot").read_text()
    assert "runs on integers" in text
    assert ">float32<" in text
    assert ">observer<" not in text


def test_unknown_suffix(qmodel, tmp_path):
    with pytest.raises(fxq.InputError, match=r"a\.gif.*svg, png, pdf, dot"):
        draw(qmodel, tmp_path / "a.gif")


def test_without_the_dot_program_the_text_is_written_all_the_same(qmodel, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(fxq.FileError, match="apt install graphviz"):
        draw(qmodel, tmp_path / "a.svg")
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    fxq.quantize(nn.Linear(2, 2).eval(), torch.randn(2, 2), dump=tmp_path / "d", on_low_sqnr="ignore")
    assert (tmp_path / "d" / "00-trace.dot").exists()


def test_a_folder_that_is_not_there(qmodel, tmp_path):
    with pytest.raises(fxq.FileError, match=r"no folder .*nowhere; create it"):
        draw(qmodel, tmp_path / "nowhere" / "a.dot")


def test_a_dot_program_that_fails(qmodel, tmp_path, monkeypatch):
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\necho out of paper >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(fxq.FileError, match="out of paper"):
        draw(qmodel, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_integer_weights_are_integers_in_colour(qmodel, tmp_path):
    text = draw(fxq.expand(qmodel), tmp_path / "a.dot", constants=True).read_text()
    (edge,) = [line for line in text.splitlines() if '"int8[' in line][:1]
    assert COLOURS["int8"][1] in edge
