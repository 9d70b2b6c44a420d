"""A graph as a picture, and as a networkx graph.

Colours say what runs: green on integers, blue in float32, amber where one becomes the other. Edges carry dtype, shape,
scale and zero point; boxes are the user's modules. Sizes, masks and constants are left out unless asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import graphviz
import networkx as nx
from torch.fx import GraphModule, Node

from fxq import qdq
from fxq.errors import FileError, InputError
from fxq.expansion import summary
from fxq.graph import Value, constant, is_float_tensor, line_of, module_of, submodule, target_name
from fxq.observers import Observer, Rows, WeightObserver
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.ops.linear_dynamic_engine import qlinear_dynamic_engine
from fxq.ops.linear_weight_only import linear_weight_only
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.profiling import Profile
from fxq.stages import quantized_nodes

SUFFIXES = ("svg", "png", "pdf", "dot")
BORDERS = frozenset({qdq.quantize, quantize_scaled, qdq.dequantize, qdq.quantize_weight, qdq.dequantize_weight})
COLOURS = {  # fill, line
    "int8": ("#d3f0d9", "#1e7a34"),
    "weight": ("#d6eef0", "#1f7480"),
    "float": ("#d9e6fb", "#2b5fb0"),
    "border": ("#fdebc8", "#a86a00"),
    "observer": ("#f3d9f5", "#86348c"),
    "constant": ("#eeeeee", "#777777"),
    "aside": ("#ffffff", "#999999"),
    "io": ("#ffffff", "#222222"),
}
MEANINGS = {
    "int8": "runs on integers",
    "weight": "int8 weights, float sums",
    "float": "float32",
    "border": "float32 to integers, or back",
    "observer": "observer",
    "constant": "constant",
    "aside": "sizes, ids, masks",
}
TALL = 40
"""Operations in a picture from which on it is drawn from top to bottom."""

_DYNAMIC = (qlinear_dynamic, qlinear_dynamic_engine)


def to_networkx(gm: GraphModule) -> nx.DiGraph[str]:
    """The graph by node name. Of a node: op, target, module, line, form, dtype, shape, scale, zero_point, label.

    form: "int8", "weight" (int8 weights, float sums), "float", "border" (quantize, dequantize), "observer", "constant",
    "aside" (sizes, ids, masks), "io".
    An edge has the dtype, shape, scale and zero_point of what flows along it.
    """
    if not isinstance(gm, GraphModule):
        raise InputError(f"a {type(gm).__name__} has no graph; give what fxq.quantize, prepare or trace returns")
    graph: nx.DiGraph[str] = nx.DiGraph()
    quantized = quantized_nodes(gm)
    for node in gm.graph.nodes:
        graph.add_node(
            node.name,
            op=node.op,
            target=target_name(node.target),
            module=module_of(node),
            line=line_of(node),
            form=_form(gm, node, quantized),
            label=_label(gm, node),
            **_value(node),
        )
        for operand in node.all_input_nodes:
            graph.add_edge(operand.name, node.name, **_value(operand))
    return graph


def islands(gm: GraphModule) -> list[set[str]]:
    """The connected regions of a graph that run on integers, by node name, in graph order."""
    graph = to_networkx(gm)
    integers = graph.subgraph(name for name, data in graph.nodes(data=True) if data["form"] == "int8")
    order = {name: i for i, name in enumerate(graph)}
    return sorted(nx.weakly_connected_components(integers), key=lambda names: min(map(order.__getitem__, names)))


def _value(node: Node) -> dict[str, Any]:
    value = node.meta.get("value")
    scale, zero_point = node.meta.get("qparams", (None, None))
    if not isinstance(value, Value):
        return {"dtype": None, "shape": None, "scale": scale, "zero_point": zero_point}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": value.shape, "scale": scale, "zero_point": zero_point}


def _form(gm: GraphModule, node: Node, quantized: set[Node]) -> str:
    if node.op in ("placeholder", "output"):
        return "io"
    if node.op == "get_attr":
        return "constant"
    if node.op == "call_module" and isinstance(submodule(gm, node), Observer | Rows | WeightObserver):
        return "observer"
    if node.target in BORDERS:
        return "border"
    reads_integers = "inside" in node.meta or any(operand in quantized for operand in node.all_input_nodes)
    if node in quantized or (reads_integers and is_float_tensor(node)) or node.target in _DYNAMIC:
        return "int8"
    if node.target is linear_weight_only:
        return "weight"
    return "float" if is_float_tensor(node) else "aside"


def _label(gm: GraphModule, node: Node) -> str:
    if node.op == "placeholder":
        return str(node.target)
    if node.op == "output":
        return "output"
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "call_module":
        module = submodule(gm, node)
        return f"observer\n{module.where}" if isinstance(module, Observer | WeightObserver) else type(module).__name__
    lines = [target_name(node.target).removeprefix("fxq.")]
    if "inside" in node.meta:
        lines += [f"{op} {text}" for _, op, text in summary(gm, node)]
    elif target_name(node.target).startswith(("fxq.qlinear", "fxq.linear")):
        x = node.args[0]
        assert isinstance(x, Node)
        values = node.meta["value"]
        widths = [value.shape[-1] for value in (values if isinstance(values, list) else [values])]
        lines.append(f"{x.meta['value'].shape[-1]} -> {' + '.join(map(str, widths))}")
    else:
        weights = [constant(gm, n) for n in node.all_input_nodes if n.op == "get_attr"]
        lines += [" x ".join(map(str, weight.shape)) for weight in weights if weight.dim() > 1]
    return "\n".join(lines)


def draw(
    gm: GraphModule,
    path: str | Path,
    *,
    direction: Literal["LR", "TB"] | None = None,
    constants: bool = False,
    profile: Profile | None = None,
) -> Path:
    """Draw `gm` into an svg, png, pdf or dot file, by the suffix of `path`; returns the path.

    direction: left to right, or top to bottom (by size if not given). constants: also weights and scales.
    profile: what `fxq.profile` found for `gm`: boxes then carry their time, and are the redder the longer they take.
    Raises `InputError` for another suffix, and `FileError` where the `dot` program is missing: the dot text is written
    all the same.
    """
    path = Path(path)
    suffix = path.suffix.removeprefix(".")
    if suffix not in SUFFIXES:
        raise InputError(f"cannot draw {path.name!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileError(f"cannot draw {path}: there is no folder {path.parent}; create it first")
    source = _dot(gm, direction, constants, profile)
    text = path.with_suffix(".dot")
    drawable = shutil.which("dot") is not None
    if suffix == "dot" or not drawable:
        text.write_text(source.source, encoding="utf-8")
    if suffix == "dot":
        return path
    if not drawable:
        raise FileError(
            f"{path} cannot be drawn: the program `dot` is missing; the graph is written to {text}. Install Graphviz "
            "(apt install graphviz, brew install graphviz, winget install graphviz)"
        )
    path.write_bytes(_rendered(source, suffix, path))
    return path


def _rendered(source: graphviz.Digraph, suffix: str, path: Path) -> bytes:
    """The picture that the program `dot` makes; raises `FileError` with its own words where it fails."""
    try:
        picture: bytes = source.pipe(format=suffix)
    except graphviz.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip() if error.stderr else str(error)
        raise FileError(f"{path} cannot be drawn: `dot` fails: {said}; draw a .dot file instead") from error
    return picture


def draw_step(gm: GraphModule, stem: Path) -> None:
    """The pictures of a dump: always the dot text, and an svg where the `dot` program is there."""
    draw(gm, stem.with_suffix(".dot"))
    if shutil.which("dot") is not None:
        svg = stem.with_suffix(".svg")
        svg.write_bytes(_rendered(_dot(gm, None, False), "svg", svg))


def _dot(gm: GraphModule, direction: str | None, constants: bool, profile: Profile | None = None) -> graphviz.Digraph:
    graph = to_networkx(gm)
    if profile is not None:
        _colour_by_time(gm, graph, profile)
    _join_output(graph)
    hidden = {"aside"} if constants else {"aside", "constant"}
    graph.remove_nodes_from([name for name, data in graph.nodes(data=True) if data["form"] in hidden])
    graph.remove_nodes_from(
        [name for name, data in graph.nodes(data=True) if data["form"] == "io" and not graph.degree(name)]
    )
    shown = list(graph)
    direction = direction or ("TB" if len(shown) > TALL else "LR")
    dot = graphviz.Digraph(
        graph_attr={
            "rankdir": direction,
            "fontname": "Helvetica",
            "fontsize": "11",
            "nodesep": "0.25",
            "ranksep": "0.35",
            "compound": "true",
        },
        node_attr={
            "shape": "box",
            "style": "filled,rounded",
            "fontname": "Helvetica",
            "fontsize": "11",
            "height": "0.3",
        },
        edge_attr={"fontname": "Helvetica", "fontsize": "9", "arrowsize": "0.6"},
    )
    _cluster(dot, graph, shown, "")
    _legend(dot, {graph.nodes[name]["form"] for name in shown})
    for source, target, data in graph.edges(data=True):
        integers = data["scale"] is not None or data["dtype"] in ("int8", "uint8")
        form = "aside" if data["dtype"] is None else "int8" if integers else "float"
        colour = COLOURS[form][1]
        label = _edge_label(data)
        if direction == "TB":  # the label stands to the right of the line, which it would touch
            label = "\n".join(f"   {line}" for line in label.splitlines())
        dot.edge(source, target, label=label, color=colour, fontcolor=colour)
    return dot


def _colour_by_time(gm: GraphModule, graph: nx.DiGraph[str], profile: Profile) -> None:
    """White for no time, red for the longest of all; the label ends in the time and its share.

    A block takes what its operations take.
    """
    around = {link.name: node.name for node in gm.graph.nodes for link in node.meta.get("inside", ())}
    spent: dict[str, float] = {}
    for timing in profile.timings:
        name = timing.node if timing.node in graph else around.get(timing.node, "")
        if name not in graph:
            raise InputError(f"the profile knows {timing.node!r}, which this graph does not have: profile this one")
        spent[name] = spent.get(name, 0.0) + timing.measured
    total, longest = sum(spent.values()), max(spent.values(), default=1.0)
    for name, seconds in spent.items():
        data, pale = graph.nodes[name], round(255 - 160 * seconds / longest)
        data["fill"] = f"#ff{pale:02x}{pale:02x}"
        data["label"] += f"\n{1e6 * seconds:.0f} us, {100 * seconds / total:.0f} %"


def _legend(dot: graphviz.Digraph, forms: set[str]) -> None:
    """One box that says what the colours mean; no edge touches it, so it stands beside the graph."""
    rows = "".join(
        f'<TR><TD BGCOLOR="{fill}" COLOR="{line}" BORDER="1">{MEANINGS[form]}</TD></TR>'
        for form, (fill, line) in COLOURS.items()
        if form in forms and form in MEANINGS
    )
    if rows:
        table = f'<<TABLE BORDER="0" CELLSPACING="3" CELLPADDING="3">{rows}</TABLE>>'
        dot.node("(legend)", label=table, shape="plaintext", style="", fontsize="9")


def _join_output(graph: nx.DiGraph[str]) -> None:
    """Lead the tensors that a container of the output holds past the container, which is not drawn."""
    output = next(name for name, data in graph.nodes(data=True) if data["op"] == "output")
    aside = [name for name, data in graph.nodes(data=True) if data["form"] == "aside"]
    containers = nx.ancestors(graph.subgraph([*aside, output]), output)
    for source, _, data in list(graph.in_edges(containers, data=True)):
        if source not in containers:
            graph.add_edge(source, output, **data)


def _edge_label(data: dict[str, Any]) -> str:
    if data["dtype"] is None:
        return ""
    lines = [f"{data['dtype']}{list(data['shape'])}"]
    if data["scale"] is not None:
        lines.append(f"{data['scale']:.3g}, {data['zero_point']}")
    return "\n".join(lines)


def _cluster(dot: graphviz.Digraph, graph: nx.DiGraph[str], names: Iterable[str], prefix: str) -> None:
    """Draw the nodes of the module at `prefix`, with a box for each module below it."""
    children: dict[str, list[str]] = {}
    for name in names:
        data = graph.nodes[name]
        rest = _below(data, prefix)
        if rest:
            children.setdefault(rest[0], []).append(name)
        else:
            fill, line = COLOURS[data["form"]]
            dot.node(name, label=data["label"], fillcolor=data.get("fill", fill), color=line)
    for child, inside in children.items():
        path = f"{prefix}.{child}" if prefix else child
        label = child
        while len({_below(graph.nodes[name], path)[:1] for name in inside}) == 1 and (
            rest := _below(graph.nodes[inside[0]], path)
        ):
            path, label = f"{path}.{rest[0]}", f"{label}.{rest[0]}"  # one box for modules that hold one module
        with dot.subgraph(name=f"cluster_{path}") as box:
            box.attr(label=label, style="rounded", color="#bbbbbb", fontcolor="#555555", labeljust="l")
            _cluster(box, graph, inside, path)


def _below(data: dict[str, Any], prefix: str) -> tuple[str, ...]:
    """The parts of a node's module path below the module at `prefix`."""
    if data["form"] == "io" or not data["module"]:
        return ()
    parts = tuple(data["module"].split("."))
    return parts[len(prefix.split(".")) :] if prefix else parts
