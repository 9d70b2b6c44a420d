"""Models that no one here wrote: transformers, the well-known vision and sequence models, and torch's own test models.

Each is quantized once, with random weights, and then every promise about the result is held to it.
"""

import copy
import functools
import importlib.util
import io
import os
import sys
import threading
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import fxq
from fxq.comparison import output_sqnr
from fxq.tracing.values import tensors

os.environ["HF_HUB_OFFLINE"] = "1"
MIN_SQNR = 20
CROSS_BATCH = {"CLIP", "TestHelperModules.ControlFlow", "ModelWithFunctionals"}
"""Models whose rows see one another."""


def models(kind):
    """`MODELS` of one file in tests/zoo, whose classes can be pickled."""
    name = f"zoo_{kind}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "zoo" / f"{kind}_models.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].MODELS


NEEDS_TRUST = {"DeepLab", "ManualEmbeddingBagLinear", "EmbeddingWithStaticLinear"}
"""Models whose files call more than arithmetic: an output's own class, an embedding with a qconfig on it."""
ROUNDING_NOISE = {"NormalizationTestModel"}
"""Models whose float output is 0 but for rounding: an instance norm of values that are all equal."""
REFUSED = ("shipped", "TestHelperModules.ControlFlow")
ALL = [(kind, name) for kind in ("transformers", "vision", "shipped") for name in models(kind)]
QUANTIZED = [entry for entry in ALL if entry != REFUSED]
ROWS = {"transformers": (4, 3), "vision": (8, 3), "shipped": (16, 12)}
"""Rows of a calibration batch, and batches."""

every = pytest.mark.parametrize("entry", QUANTIZED, ids="-".join)
Subject = namedtuple("Subject", "model qmodel inputs name")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Of torch's, so that float islands compute the same bits in whatever Python thread they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(module, inputs):
    with torch.no_grad():
        return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def fresh(inputs):
    return torch.utils._pytree.tree_map(lambda x: x.clone(), inputs)


@functools.cache
def quantized(entry):
    """A model and its quantized form; inputs(n) makes more of the calibration's distribution."""
    kind, name = entry
    make, inputs = models(kind)[name]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say while they build a model is theirs
        model = make().eval()
    rows, batches = ROWS[kind]
    data = [inputs(rows) for _ in range(batches)]
    on_low_sqnr = "ignore" if name in ROUNDING_NOISE else "error"
    qmodel = fxq.quantize(model, data[0], calibration_data=data, on_low_sqnr=on_low_sqnr, progress=False)
    return Subject(model, qmodel, inputs, name)


def same(a, b):
    """Whether two outputs have the same structure and bits."""
    if torch.utils._pytree.tree_structure(a) != torch.utils._pytree.tree_structure(b):
        return False
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def alike(subject, a, b):
    """The same bits where all runs on integers; where float islands sum in another order, the noise that makes."""
    if subject.name in ROUNDING_NOISE:
        return True
    return output_sqnr(a, b) >= 30 if subject.qmodel.report.kept_float() else same(a, b)


def test_the_size_of_the_zoo():
    counts = {kind: len(models(kind)) for kind in ROWS}
    assert counts["transformers"] >= 15 and counts["vision"] >= 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shipped = sys.modules["zoo_shipped"].shipped
    own = {
        name
        for scope in (shipped, shipped.TestHelperModules)
        for name, cls in vars(scope).items()
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == shipped.__name__
    }
    parts = {"DummyObserver", "DenseTopMLP", "EmbBagWrapper"}
    assert own - parts == {name.partition("(")[0].rpartition(".")[2] for name in models("shipped")}


@every
def test_fresh_inputs(entry):
    """20 dB or more on what calibration has not seen, with another number of rows."""
    subject = quantized(entry)
    inputs = subject.inputs(16)
    expected, actual = call(subject.model, fresh(inputs)), call(subject.qmodel, fresh(inputs))
    assert torch.utils._pytree.tree_structure(expected) == torch.utils._pytree.tree_structure(actual)
    assert [t.shape for t in tensors(expected)] == [t.shape for t in tensors(actual)]
    if subject.name in ROUNDING_NOISE:
        assert all(float(t.abs().max()) < 1e-2 for t in tensors((expected, actual)))
    else:
        assert output_sqnr(expected, actual) >= MIN_SQNR


@every
def test_every_product_is_int8_or_says_why(entry):
    """All multiply-accumulates of linears are int8; what else multiplies says truly that there is no integer form."""
    report = quantized(entry).qmodel.report
    linears = [d for d in report.decisions if d.op == "linear"]
    assert all(d.form == "int8" for d in linears)
    if entry[0] == "transformers":
        assert linears
    assert {d.reason.name for d in report.refusals()} <= {"NO_INTEGER_OP", "RECURRENT"}
    assert not any(d.op in ("linear", "addmm", "Linear") for d in report.refusals())


@every
def test_copies_and_files(entry, tmp_path):
    subject = quantized(entry)
    inputs = subject.inputs(4)
    expected = call(subject.qmodel, fresh(inputs))
    copied = copy.deepcopy(subject.qmodel)
    assert same(call(copied, fresh(inputs)), expected)

    for tensor in copied.state_dict().values():
        tensor.zero_()
    copied.load_state_dict(subject.qmodel.state_dict())
    assert same(call(copied, fresh(inputs)), expected)

    buffer = io.BytesIO()
    torch.save(subject.qmodel, buffer)
    buffer.seek(0)
    assert same(call(torch.load(buffer, weights_only=False), fresh(inputs)), expected)

    fxq.save(subject.qmodel, tmp_path / "model.fxq")
    if trust := entry[0] == "transformers" or subject.name in NEEDS_TRUST:
        with pytest.raises(fxq.FileError, match="trust=True"):
            fxq.load(tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq", trust=trust)
    assert same(call(loaded, fresh(inputs)), expected)
    assert str(loaded.report) == str(subject.qmodel.report)


@every
def test_rows_by_themselves(entry):
    """A smaller batch gives what the first rows of a larger one give."""
    subject = quantized(entry)
    inputs = subject.inputs(6)
    whole = call(subject.qmodel, fresh(inputs))
    if subject.name in CROSS_BATCH or not all(t.shape[:1] == (6,) for t in tensors((inputs, whole))):
        few = subject.inputs(8)
        assert output_sqnr(call(subject.model, fresh(few)), call(subject.qmodel, fresh(few))) >= MIN_SQNR
        return
    first, expected = (torch.utils._pytree.tree_map(lambda x: x[:2], value) for value in (inputs, whole))
    assert alike(subject, call(subject.qmodel, fresh(first)), expected)


@every
def test_inference_mode_and_strides(entry):
    subject = quantized(entry)
    inputs = subject.inputs(4)
    expected = call(subject.qmodel, fresh(inputs))
    with torch.inference_mode():
        assert same(call(subject.qmodel, fresh(inputs)), expected)
    strided = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x], -1)[..., 0], inputs)
    assert alike(subject, call(subject.qmodel, strided), expected)


@every
def test_two_threads(entry):
    subject = quantized(entry)
    batches = [subject.inputs(4), subject.inputs(6)]
    expected = [call(subject.qmodel, fresh(batch)) for batch in batches]
    wrong = []

    def work(i):
        for _ in range(3):
            if not same(call(subject.qmodel, fresh(batches[i])), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


RECIPES = {
    "w8a8-dynamic": ("transformers", "GPT-2"),
    "w8a32": ("transformers", "T5"),
    "w8a16": ("transformers", "DistilBERT"),
    "fixed": ("vision", "MobileNetV3"),
    "tflite": ("vision", "CREPE"),
    "uint8": ("vision", "U-Net"),
}
OTHER = list(RECIPES.items())
OTHER += [(recipe, ("shipped", name)) for recipe in RECIPES for name in ("SparseNNModel", "ConvModel")]


def recipe_of(name):
    """Whatever it costs on this machine."""
    options = {"fixed": {"requant": "fixed"}, "tflite": {"requant": "fixed", "rounding": "tflite"}}
    if name == "uint8":
        return fxq.Recipe(outputs="uint8", judge_costs=False)
    return fxq.Recipe("w8a8" if name in options else name, judge_costs=False, **options.get(name, {}))


@pytest.mark.parametrize(("recipe", "entry"), OTHER, ids=lambda value: value if isinstance(value, str) else value[1])
def test_other_recipes(recipe, entry, tmp_path):
    """Near to float, NumPy's bits, files, comparison: also where a recipe finds nothing to quantize."""
    kind, name = entry
    make, inputs = models(kind)[name]
    torch.manual_seed(1)
    model, data = make().eval(), [inputs(ROWS[kind][0]) for _ in range(ROWS[kind][1])]
    x = inputs(4)
    if recipe == "w8a16":
        model, (x, *data) = model.bfloat16(), map(narrow, (x, *data))
    qmodel = fxq.quantize(model, data[0], calibration_data=data, recipe=recipe_of(recipe), progress=False)
    outputs = call(qmodel, fresh(x))
    assert output_sqnr(call(model, fresh(x)), qmodel.dequantize(outputs)) >= MIN_SQNR
    assert fxq.compare(model, qmodel, fresh(x)).output >= MIN_SQNR
    fxq.save(qmodel, tmp_path / "model.fxq")
    assert same(call(fxq.load(tmp_path / "model.fxq", trust=True), fresh(x)), outputs)
    if recipe != "w8a16":
        arrays = torch.utils._pytree.tree_map(lambda t: t.numpy(), x)
        golden = fxq.golden(qmodel, islands="torch")
        found = golden(**arrays) if isinstance(arrays, dict) else golden(*arrays)
        pairs = zip(torch.utils._pytree.tree_leaves(found), tensors(outputs), strict=True)
        assert all((array == y.numpy()).all() for array, y in pairs)


def narrow(inputs):
    """Inputs as w8a16 takes them."""
    return torch.utils._pytree.tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)


def test_what_is_refused_says_why():
    """A model whose own code compiles a part of itself (control_flow.map): the line, the cause, a remedy that works."""
    make, inputs = models(REFUSED[0])[REFUSED[1]]
    with pytest.raises(fxq.TraceError, match=r"compiles a part of itself \(torch.cond, torch.compile\)"):
        fxq.quantize(make().eval(), inputs(2))
