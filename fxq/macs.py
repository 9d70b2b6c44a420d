"""Multiply-accumulates of every node of a graph, counted on the examples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxq.graph import Interpreter, bind, is_call, unchanged
from fxq.inputs import Call
from fxq.tracing.values import map_tensors

# What torch's own table of products lacks on CPUs; formulas take shapes and return operations, two per product.
_MORE: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),  # type: ignore[no-untyped-call]
    torch.ops.aten._trilinear: lambda a, b, c, *_, out_shape, **__: 2 * math.prod(out_shape) * math.prod(b[-2:]),
}


class _Counter(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.counts: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        if not is_call(n):
            return super().run_node(n)
        with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
            result = super().run_node(n)
        operations = counter.get_total_flops()
        if n.op == "call_module":
            operations = max(operations, 2 * self._recurrent(n, result))  # torch counts some kinds itself
        if operations:
            self.counts[n] = operations // 2
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # torch's counter hooks itself to the gradient of what modules read, which views made without one do not have.
        args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.detach())
        return super().call_module(target, args, kwargs)

    def _recurrent(self, n: Node, result: Any) -> int:
        """Recurrent layers run in one opaque call: each weight matrix is used once per step and sequence."""
        module = self.fetch_attr(str(n.target))
        if not isinstance(module, nn.RNNBase):
            return 0
        output = result[0]
        steps = len(output.data) if isinstance(output, PackedSequence) else math.prod(output.shape[:-1])
        products: int = steps * sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
        return products


def count_macs(gm: GraphModule, call: Call) -> dict[Node, int]:
    """Multiply-accumulates of the nodes that have any, from running `gm` once on `call`."""
    own = call.clone()
    counter = _Counter(gm)
    with torch.no_grad(), unchanged(gm):
        counter.run(*bind(gm, own.args, own.kwargs))
    return counter.counts
