"""make_trainable: fake quantization in the place of observers, parameters in the place of constants.

    observer(x)                               ->  fake_quantize(x)             its range, or step, is learned
    dropout(x) behind which an observer is    ->  dropout(fake_quantize(x))    inference has no dropout to observe
    linear(x, observer(w_folded), b_folded)   ->  norm(x, w, b)                `FoldedBatchNorm` at the norm's path
    batch_norm(x, mean, var, ...)             ->  norm(x)                      where it is a module of torch's
    attention(q, k, v, ...)                   ->  trained_attention(...)       rounds its weights where q, k, v are fake
    a constant that is a view of a parameter  ->  as_strided(parameter)        so that gradients reach it

So all parameters are the user's, under the user's names. `end_training` takes it all back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxq.batch_norm import FOLDED, BatchNorm, Folded, FoldedBatchNorm
from fxq.fake_quantize import (
    FakeQuantize,
    LearnedFakeQuantize,
    LearnedWeightFakeQuantize,
    TrainedAttention,
    WeightFakeQuantize,
)
from fxq.graph import bypass, call, constant, get_attr, submodule
from fxq.observers import Observer, WeightObserver
from fxq.ops.dropout import DROPOUT, Dropout
from fxq.pipeline import Context, Numbers
from fxq.sampling import SAMPLE, sample_of
from fxq.spelling import ATTENTION, BATCH_NORM
from fxq.stages import Stage

HOLDER = "attentions"
"""The submodule that holds the attentions."""


@dataclass(frozen=True)
class MakeTrainable:
    """See the module's docstring."""

    name: str = "make-trainable"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of rewrites."""
        count = sum(_hoist(gm, node) for node in list(gm.graph.nodes) if not node._erased)
        count += _fake_quantize(gm, ctx.recipe.learn_steps)
        count += sum(_unfold(gm, node) for node in list(gm.graph.nodes) if FOLDED in node.meta)
        count += sum(_train(gm, node) for node in list(gm.graph.nodes) if node.target is BATCH_NORM)
        count += sum(_attend(gm, node) for node in list(gm.graph.nodes) if node.target is ATTENTION)
        count += _read_through_parameters(gm)
        if sample_of(gm) is not None:
            gm.delete_submodule(SAMPLE)  # training sees to what it is for
        gm.eval()
        return count


def _hoist(gm: GraphModule, node: Node) -> int:
    """An observer that alone reads a dropout moves before it; where what it reads is observed alike, it goes."""
    if node.op != "call_module" or not isinstance(submodule(gm, node), Observer):
        return 0
    dropout = node.args[0]
    assert isinstance(dropout, Node)
    if dropout.op != "call_module" or not isinstance(submodule(gm, dropout), Dropout) or len(dropout.users) != 1:
        return 0
    (x,) = dropout.args
    assert isinstance(x, Node)
    node.replace_all_uses_with(dropout)
    if x.target != node.target:
        with gm.graph.inserting_before(dropout):
            observer = call(gm, str(node.target), (x,), x)
        dropout.args = (observer,)
        gm.graph.erase_node(node)
        return 1 + _hoist(gm, observer)
    gm.graph.erase_node(node)
    return 1


def _fake_quantize(gm: GraphModule, learned: bool) -> int:
    """Replace the observers, each with as many calls as it has."""
    nodes: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(submodule(gm, node), Observer | WeightObserver):
            nodes.setdefault(str(node.target), []).append(node)
    count = 0
    for path, calls in nodes.items():
        observer = gm.get_submodule(path)
        if isinstance(observer, FakeQuantize | WeightFakeQuantize):
            continue
        count += 1
        fake: nn.Module
        if isinstance(observer, WeightObserver):
            w = calls[0].args[0]
            assert isinstance(w, Node)
            kind = LearnedWeightFakeQuantize if learned else WeightFakeQuantize
            fake = kind(observer.where, observer.granularity, constant(gm, w).detach())
        else:
            assert isinstance(observer, Observer)
            fake = (LearnedFakeQuantize if learned else FakeQuantize)(observer.where, len(calls))
        gm.set_submodule(path, fake)
    return count


def _unfold(gm: GraphModule, product: Node) -> int:
    """norm(x, w, b) in the place of a product that has swallowed its norm."""
    origin: Folded = product.meta[FOLDED]
    x, w, b, *rest = product.args
    assert isinstance(w, Node) and isinstance(b, Node) and callable(product.target) and origin.weight is not None
    fake = None
    constants = [w, b]
    if w.op == "call_module":
        fake = submodule(gm, w)
        constants[0] = w.all_input_nodes[0]
    gm.set_submodule(origin.norm, FoldedBatchNorm(gm.get_submodule(origin.norm), product.target, fake))
    with gm.graph.inserting_before(product):
        parts = [None if path is None else get_attr(gm, path, product) for path in (origin.weight, origin.bias)]
        norm = call(gm, origin.norm, (x, *parts, *rest), product)
    bypass(gm, product, norm)
    if fake is not None:
        gm.delete_submodule(str(w.target))
    for node in constants:
        owner, _, name = str(node.target).rpartition(".")
        delattr(gm.get_submodule(owner), name)
    return 1


def _train(gm: GraphModule, node: Node) -> int:
    """A norm of torch's that nothing has swallowed becomes a call of its module."""
    mean = node.args[1]
    assert isinstance(mean, Node)
    path = str(mean.target).rpartition(".")[0]
    module = gm.get_submodule(path) if mean.op == "get_attr" else None
    if not isinstance(module, _BatchNorm):
        return 0
    if isinstance(module, BatchNorm):
        module.calls += 1
    else:
        gm.set_submodule(path, BatchNorm(module))
    with gm.graph.inserting_before(node):
        bypass(gm, node, call(gm, path, (node.args[0],), node))
    return 1


def _attend(gm: GraphModule, node: Node) -> int:
    """An attention among integers, or with dropout, becomes a module."""
    modules = [submodule(gm, x) if isinstance(x, Node) and x.op == "call_module" else None for x in node.args[:3]]
    rounds, dropout = all(isinstance(module, FakeQuantize) for module in modules), node.meta.get(DROPOUT, 0.0)
    if not rounds and not dropout:
        return 0
    path = f"{HOLDER}.{node.name}"
    if not hasattr(gm, HOLDER):
        gm.add_module(HOLDER, nn.Module())
    gm.add_submodule(path, TrainedAttention(rounds, dropout))
    with gm.graph.inserting_before(node):
        bypass(gm, node, call(gm, path, node.args, node))
    return 1


def _read_through_parameters(gm: GraphModule) -> int:
    """Constants that `normalize` has made of parts and transposes of parameters, in the memory of these."""
    owners = {p.untyped_storage().data_ptr(): path for path, p in gm.named_parameters() if p.numel()}
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    views = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) not in parameters]
    count = 0
    for node in views:
        tensor = constant(gm, node)
        path = owners.get(tensor.untyped_storage().data_ptr())
        if path is None or not tensor.numel():
            continue
        assert parameters[path].storage_offset() == 0, "parameters are copies, in memory of their own"
        with gm.graph.inserting_before(node):
            args = (get_attr(gm, path, node), tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            bypass(gm, node, call(gm, torch.as_strided, args, node))
        count += 1
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for path in {str(node.target) for node in views} - used:
        owner, _, name = path.rpartition(".")
        delattr(gm.get_submodule(owner), name)
    return count


PASS = MakeTrainable()
