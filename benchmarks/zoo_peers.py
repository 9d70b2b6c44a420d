"""Models that no one here wrote: the default recipe's accuracy beside that of the peers with static int8.

    make zoo-peers                            all of them, some twenty minutes of one core; needs the peers installed
    python -m benchmarks.zoo_peers --only X   those whose name holds X

Each model of tests/zoo is quantized by fxq (without choices by time, which would keep layers float) and by each peer
from the same batches. SQNR is that of the worst float output, over batches that none has seen. Beside it stands how
many products (two for an attention) and embedding tables are int8: who leaves some in float has it easier, and who
leaves all of them is no contestant.

Of a network with a handful of weights a single draw says little, so that `SEEDS` of them are compared one by one, and
`MOST_SEEDS` where a peer seems to be ahead. A peer is ahead where it is by more than `NOISE` in the median. Draws whose
output does not depend on the input, since all of their relus are dead, are left out. Exits with 1 where one is ahead.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxq
from benchmarks import peers
from benchmarks.models import silence
from benchmarks.peers import Bind, Inputs, Model
from benchmarks.zoo import ROWS, zoo
from fxq.comparison import sqnr
from fxq.inputs import Call, as_call
from fxq.tracing.values import tensors

NOISE = 0.3
"""dB."""
BATCHES = 8
"""To calibrate on, and as many to measure with."""
SEEDS = {"transformers": 1, "vision": 1, "shipped": 5}
"""Of weights and data."""
MOST_SEEDS = {"transformers": 1, "vision": 1, "shipped": 20}
NOTHING = 1e-6
"""An output that varies by less is what float32 leaves of a constant."""
RECIPE = fxq.Recipe(judge_costs=False)
Make = Callable[[], nn.Module]
Draw = Callable[[int], Any]


class Plain(nn.Module):
    """A model whose arguments are the tensors inside of `call`, one after the other; it returns its float tensors."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.structure = pytree.tree_structure((call.args, call.kwargs))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same numbers."""
        args, kwargs = pytree.tree_unflatten(inputs, self.structure)
        return tuple(x for x in tensors(self.model(*args, **kwargs)) if x.is_floating_point())


def leaves(inputs: Any) -> Inputs:
    """The tensors inside of what a model of the zoo is called with."""
    call = as_call(inputs)
    return tuple(pytree.tree_leaves((call.args, call.kwargs)))


def floats(output: Any) -> list[Tensor]:
    """The float tensors that any contestant returns, copied."""
    if isinstance(output, np.ndarray | Tensor):
        tensor = torch.as_tensor(output)
        return [tensor.clone()] if tensor.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in floats(value)]


@dataclass(frozen=True)
class Reached:
    """SQNR in dB, and how many products and embeddings are int8."""

    sqnr: float
    int8: int

    def __str__(self) -> str:
        return f"{self.sqnr:6.1f} dB {self.int8 or 'float':>5}"


def torch_products(model: nn.Module) -> int:
    """Products and embeddings in int8 of a model that torch.ao has quantized."""
    kinds = ("linear", "conv", "embedding_ops", "linear_relu", "conv_relu", "conv_fused", "linear_fused")
    packed = ("LinearPackedParams", "EmbeddingPackedParams")
    names = [type(m).__module__.split(".") for m in model.modules() if type(m).__name__ not in packed]
    return sum("quantized" in name and name[-1] in kinds for name in names)


def onnx_products(path: Path) -> int:
    """The same of an ONNX file; an attention is two products."""
    import onnx

    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    kinds = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
    return sum(makers.get(n.input[0]) == "DequantizeLinear" for n in graph.node if n.op_type in kinds)


def openvino_products(graph: Any) -> int:
    """The same of an OpenVINO model."""
    products = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
    moves = (
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Concat",
        "VariadicSplit",
        "Convert",
        "Multiply",
        "Subtract",
    )
    count = 0
    for op in graph.get_ops():
        if op.get_type_name() in (*products, "Gather"):
            source = op.input_value(0).get_node()
            while source.get_type_name() in moves:
                source = source.input_value(0).get_node()
            table = op.get_type_name() == "Gather" and source.get_type_name() == "Constant"
            count += source.get_type_name() == "FakeQuantize" or (table and "8" in str(source.get_element_type()))
    return count


@dataclass(frozen=True)
class Peer:
    """prepare: as in `peers.PEERS`; quantized: what it keeps; products: counts those of that."""

    prepare: Callable[[Model], peers.Load]
    quantized: Callable[[Model], Any]
    products: Callable[[Any], int]

    def reach(self, model: Model, held_out: list[Inputs], expected: list[Tensor]) -> Reached:
        """Quantize and measure."""
        bind: Bind = self.prepare(model)(held_out[0], 1)
        reached = worst(expected, [floats(bind(inputs)()) for inputs in held_out])
        return Reached(reached, self.products(model.once(self.quantized)))


Result = Reached | str
PEERS = {
    "torch.ao": Peer(peers.torch_static, peers.torch_quantized, torch_products),
    "ORT": Peer(peers.ort_static, peers.onnx_quantized, onnx_products),
    "OpenVINO": Peer(peers.openvino_int8, peers.openvino_quantized, openvino_products),
}


def joined(outputs: list[list[Tensor]]) -> list[Tensor]:
    """Output by output what all batches gave."""
    return [torch.cat([value.flatten() for value in values]) for values in zip(*outputs, strict=True)]


def worst(expected: list[Tensor], outputs: list[list[Tensor]]) -> float:
    """The SQNR in dB of the worst output, at most 200."""
    return min(min(sqnr(x, y), 200.0) for x, y in zip(expected, joined(outputs), strict=True))


def by_fxq(model: nn.Module, data: list[Any], held_out: list[Any], expected: list[Tensor]) -> Reached:
    """`fxq.quantize`."""
    qmodel = fxq.quantize(model, data[0], calibration_data=data, recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    calls = [as_call(inputs) for inputs in held_out]
    int8 = [d for d in qmodel.report.decisions if d.form == "int8" and (d.macs or "embedding" in d.op)]
    outputs = [floats(list(tensors(qmodel(*call.args, **call.kwargs)))) for call in calls]
    attention = sum(decision.op == "attention" for decision in int8)  # two products, as the peers count them
    return Reached(worst(expected, outputs), len(int8) + attention)


def contest(name: str, kind: str, make: Make, inputs: Draw) -> dict[str, Result] | None:
    """What each contestant reaches; the name of the error where it cannot. None where the output is a constant."""
    model = make().eval()
    data, held_out = ([inputs(ROWS[kind]) for _ in range(BATCHES)] for _ in range(2))
    plain = Plain(model, as_call(data[0]))
    tuples = [[leaves(batch) for batch in batches] for batches in (data, held_out)]
    outputs = [list(plain(*batch)) for batch in tuples[1]]
    if any(_spread([output[i] for output in outputs]) < NOTHING for i in range(len(outputs[0]))):
        return None
    expected = joined(outputs)
    try:
        results: dict[str, Result] = {"fxq": by_fxq(model, data, held_out, expected)}
    except fxq.FxqError as error:
        return {"fxq": type(error).__name__}
    with tempfile.TemporaryDirectory() as folder:
        module, dynamic = (plain, 2) if kind == "transformers" else (model, 1)
        given = Model(name, module, tuples[0], Path(folder), dynamic, fixed=True)
        for peer, how in PEERS.items():
            try:
                with silence():
                    results[peer] = how.reach(given, tuples[1], expected)
            except Exception as error:  # a peer may fail in any way; the table says so
                results[peer] = type(error).__name__
    return results


def _spread(values: list[Tensor]) -> float:
    """The largest difference between what different batches give; infinite where their sizes differ."""
    if any(value.shape != values[0].shape for value in values):
        return math.inf
    return max((float((value - values[0]).abs().max()) for value in values if value.numel()), default=math.inf)


def typical(results: list[Result]) -> Result:
    """The median SQNR; a failure where there is one."""
    reached = [result for result in results if isinstance(result, Reached)]
    if len(reached) < len(results):
        return next(result for result in results if isinstance(result, str))
    return Reached(median(result.sqnr for result in reached), reached[0].int8)


def lead(runs: list[dict[str, Result]], peer: str) -> float:
    """By how many dB a peer is ahead of fxq in the median of the draws that both manage; no contestant in float."""
    gaps = []
    for run in runs:
        own, theirs = run["fxq"], run.get(peer)
        if isinstance(own, Reached) and isinstance(theirs, Reached) and theirs.int8:
            gaps.append(theirs.sqnr - own.sqnr)
    return median(gaps) if gaps else -math.inf


def compete(name: str, kind: str, make: Make, inputs: Draw) -> tuple[str, bool]:
    """A line of the table, and whether a peer is ahead."""
    runs: list[dict[str, Result]] = []
    ahead: list[str] = []
    for seeds in (range(SEEDS[kind]), range(SEEDS[kind], MOST_SEEDS[kind])):
        for seed in seeds:
            torch.manual_seed(1 + seed)
            run = contest(name, kind, make, inputs)
            if run is not None:
                runs.append(run)
        ahead = [peer for peer in PEERS if lead(runs, peer) > NOISE]
        if not ahead:
            break
    if not runs:
        return "its output does not depend on its input", False
    results = {who: typical([run.get(who, run["fxq"]) for run in runs]) for who in runs[0]}
    columns = [f"{found:>15.15}" if isinstance(found, str) else str(found) for found in results.values()]
    texts = [f"{peer} ahead by {lead(runs, peer):.1f} dB{_fewer(results, peer)}" for peer in ahead]
    return "  ".join([*columns, f"{len(runs):2d} draws", *texts]), bool(ahead)


def _fewer(results: dict[str, Result], peer: str) -> str:
    own, theirs = results["fxq"], results[peer]
    fewer = own.int8 - theirs.int8 if isinstance(own, Reached) and isinstance(theirs, Reached) else 0
    return f" with {fewer} fewer in int8" if fewer > 0 else ""


def main() -> int:
    """Print the table; 1 where a peer is ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    only = parser.parse_args().only
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lost = 0
    for kind in ROWS:
        for short, (make, inputs) in zoo(kind).items():
            name = f"{kind}/{short}"
            if only in name:
                with torch.no_grad():
                    line, behind = compete(name, kind, make, inputs)
                lost += behind
                print(f"{name:50}  {line}", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
