"""How inputs are handed over, and what is said about those that cannot be used."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxq
from fxq.errors import CalibrationError, InputError
from fxq.inputs import Call, as_call, calibration_calls, check_finite

X, Y = torch.ones(2, 3), torch.zeros(2)


@dataclass
class Own:
    a: torch.Tensor
    b: object


@pytest.mark.parametrize(
    ("given", "kwargs", "args", "named"),
    [
        (X, None, (X,), {}),
        ((X, Y), None, (X, Y), {}),
        ([X, Y], {"k": 1}, (X, Y), {"k": 1}),
        ({"a": X}, None, (), {"a": X}),
        ({"a": X}, {"b": Y}, (), {"a": X, "b": Y}),
        (None, {"a": X}, (), {"a": X}),
        (3, None, (3,), {}),
        (({"a": X},), None, ({"a": X},), {}),
    ],
)
def test_as_call(given, kwargs, args, named):
    call = as_call(given, kwargs)
    assert (call.args, call.kwargs) == (args, named)


def test_a_named_tuple_is_one_argument():
    pair = torch.max(X, dim=1)
    assert as_call(pair).args == (pair,)


def test_keys_that_are_no_names():
    with pytest.raises(
        InputError, match=r"a dict with keys \[0\]: .* wrap a dict that is itself an argument in a tuple"
    ):
        as_call({0: X})


def test_clone_has_memory_of_its_own():
    call = Call((X, [Y, 3]), {"k": {"z": Y}})
    copied = call.clone()
    copied.args[1][0].add_(1)
    copied.kwargs["k"]["z"].add_(1)
    copied.args[1].append(4)
    assert Y.sum() == 0
    assert len(call.args[1]) == 2
    assert copied.args[1][1] == 3


def test_tensors_have_names():
    names = [name for name, _ in Call((X, {"ids": Y}), {"mask": [Y, X], "own": Own(Y, (X,))}).tensors()]
    assert names == [
        "input 0",
        "input 1['ids']",
        "input 'mask'[0]",
        "input 'mask'[1]",
        "input 'own'.a",
        "input 'own'.b[0]",
    ]


def test_a_dataclass_is_looked_into():
    copied = Call((Own(Y, [X]),)).clone().args[0]
    copied.a.add_(1)
    copied.b.append(X)
    assert Y.sum() == 0
    with pytest.raises(CalibrationError, match=r"input 0\.b\[0\] holds nan at flat index 0"):
        check_finite(Call((Own(Y, [X * torch.nan]),)), "example_inputs")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(value):
    bad = X.clone()
    bad[1, 1] = value
    check_finite(Call((X, torch.tensor([1, 2]))), "batch 0")
    with pytest.raises(
        CalibrationError, match=rf"batch 3: input 'm' holds {value} at flat index 4 \(shape \[2, 3\]\); remove"
    ):
        check_finite(Call((X,), {"m": bad}), "batch 3")


def calls(data, example):
    return list(calibration_calls(data, example))


def test_batches_like_the_examples():
    assert [c.args for c in calls([X, X], Call((X,)))] == [(X,), (X,)]
    assert [c.args for c in calls([(X, Y)], Call((X, Y)))] == [(X, Y)]
    assert [c.kwargs for c in calls([{"a": X}], Call((), {"a": X}))] == [{"a": X}]
    assert [c.args for c in calls((x for x in [X]), Call((X,)))] == [(X,)]


def test_labels_are_cut():
    assert [c.args for c in calls([(X, Y), [X, Y, Y]], Call((X,)))] == [(X,), (X,)]


def test_keyword_arguments_of_the_examples_are_kept():
    (call,) = calls([X], Call((X,), {"scale": 2}))
    assert (call.args, call.kwargs) == ((X,), {"scale": 2})


def test_a_dict_for_a_model_that_takes_one_dict():
    batch = {"ids": X}
    (call,) = calls([batch], Call((batch,)))
    assert call.args == (batch,)
    (call,) = calls([(batch, Y)], Call((batch,)))
    assert call.args == (batch,)


@pytest.mark.parametrize(
    ("data", "example", "message"),
    [
        (X, Call((X,)), r"calibration_data is one tensor of shape \[2, 3\]; give an iterable of batches: \[tensor\]"),
        ([X], Call((X, Y)), r"calibration batch 0 has 1 positional inputs, the examples have 2"),
        ([{"a": X}, (X,)], Call((), {"a": X}), r"calibration batch 1 has 1 positional inputs, the examples have 0"),
        ([{"a": X}], Call((X,)), r"calibration batch 0 has 0 positional inputs, the examples have 1"),
    ],
)
def test_batches_unlike_the_examples(data, example, message):
    with pytest.raises(InputError, match=message):
        calls(data, example)


class Kind(torch.Tensor):
    pass


ODD = {
    "sparse": (torch.eye(8).to_sparse(), "input 0 is sparse .*to_dense"),
    "nested": (torch.eye(8), "input 0 is a nested tensor; pad it"),
    "subclass": (torch.eye(8).as_subclass(Kind), "input 0 is a tensor of the class Kind; .*as_subclass"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_odd_kinds_are_refused_with_a_remedy(kind):
    tensor, message = ODD[kind]
    if kind == "nested":
        tensor = torch.nested.nested_tensor([tensor[:2], tensor[:3]])
    with pytest.raises(fxq.InputError, match=message):
        fxq.quantize(nn.Sequential(nn.Linear(8, 8)).eval(), tensor)


def test_a_model_with_a_part_that_fxq_has_quantized_is_refused():
    part = fxq.quantize(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(32, 8))
    with pytest.raises(fxq.InputError, match="module '0' is already quantized by fxq"):
        fxq.quantize(nn.Sequential(part, nn.Linear(8, 8)).eval(), torch.randn(32, 8))


def test_integers_in_other_forms_are_refused():
    x, model = torch.randn(32, 8), nn.Sequential(nn.Linear(8, 8)).eval()
    expanded = fxq.expand(fxq.quantize(model, x))
    with pytest.raises(fxq.InputError, match="module '0' is already quantized by fxq"):
        fxq.quantize(nn.Sequential(expanded, nn.Linear(8, 8)).eval(), x)
    with pytest.raises(fxq.InputError, match="module '0' is a W8A32Linear, quantized already; quantize the model with"):
        fxq.quantize(fxq.swap_linears(model)[0], x)


MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
EXAMPLES = torch.randn(6, 8)
MISTAKES = {
    "data that are a dict": ({"calibration_data": {"input": EXAMPLES}}, "calibration_data is a dict.*of batches"),
    "an array as a batch": ({"calibration_data": [EXAMPLES.numpy()]}, "batch 0: input 0 is a ndarray, where the examp"),
    "a batch elsewhere": ({"calibration_data": [EXAMPLES.to("meta")]}, "batch 0: input 0 is on the device meta.*cpu"),
    "no such way": ({"on_low_sqnr": "raise"}, "unknown on_low_sqnr 'raise'; there are warn, error, ignore"),
    "a leaf that is not there": ({"leaves": ("nope",)}, "no module is named by the leaf 'nope'; the model's are 0, 1"),
    "leaves that are one name": ({"leaves": "0"}, r"leaves is '0'; give a tuple: leaves=\('0',\)"),
    "a module for a leaf": ({"leaves": (MODEL[0],)}, "a leaf is a Linear; name it by its class, or by its path"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    options, message = MISTAKES[name]
    with pytest.raises(fxq.InputError, match=message):
        fxq.quantize(MODEL, EXAMPLES, progress=False, **options)


@pytest.mark.parametrize("step", [fxq.trace, fxq.prepare, fxq.prepare_qat])
def test_leaves_are_looked_for_wherever_there_are_any(step):
    with pytest.raises(fxq.InputError, match="no module is named by the leaf"):
        step(MODEL, EXAMPLES, leaves=("9",))
    wrapped = nn.DataParallel(MODEL)
    for leaf in ("2", "module.2", "*2"):
        step(wrapped, EXAMPLES, leaves=(leaf,))


@pytest.mark.parametrize("look", [fxq.expand, fxq.to_networkx, lambda model: fxq.draw(model, "m.dot")])
def test_a_model_is_no_graph(look):
    with pytest.raises(fxq.InputError, match="Sequential"):
        look(MODEL)


@pytest.mark.parametrize("given", ["text", None, EXAMPLES.numpy()], ids=["text", "none", "array"])
def test_a_call_with_what_is_no_tensor(given):
    qmodel = fxq.quantize(MODEL, EXAMPLES, recipe=fxq.Recipe(judge_costs=False))
    kind = type(given).__name__
    with pytest.raises(fxq.InputError, match=rf"^input 'input' is a {kind}; give a tensor, .* torch.float32 \[6, 8\]"):
        qmodel(given)


def test_a_call_with_a_sparse_tensor():
    qmodel = fxq.quantize(MODEL, EXAMPLES, recipe=fxq.Recipe(judge_costs=False))
    with pytest.raises(fxq.InputError, match=r"^input 'input' is sparse \(torch.sparse_coo\); give it dense"):
        qmodel(EXAMPLES.to_sparse())


@pytest.mark.parametrize("recipe", [fxq.Recipe(judge_costs=False), fxq.Recipe(judge_costs=False, reproducible=True)])
@pytest.mark.parametrize("data", [[EXAMPLES[:0], EXAMPLES], [EXAMPLES, EXAMPLES[:0]]])
def test_a_batch_may_be_empty(recipe, data):
    qmodel = fxq.quantize(MODEL, EXAMPLES, calibration_data=data, recipe=recipe, on_low_sqnr="error", progress=False)
    assert qmodel.report.sqnr > 30


def test_a_call_with_tensors_of_which_only_some_are_there():
    qmodel = fxq.quantize(MODEL, EXAMPLES, recipe=fxq.Recipe(judge_costs=False))
    with pytest.raises(RuntimeError, match="devices cpu and meta; move model and inputs to one of them"):
        qmodel(EXAMPLES.to("meta"))
    qmodel.to("meta")
    with pytest.raises(RuntimeError, match="devices cpu and meta; move model and inputs to one of them"):
        qmodel(EXAMPLES)
    assert qmodel(EXAMPLES.to("meta")).device.type == "meta"
