"""The contestants of the model benchmark, each in the form that its own documentation recommends.

A contestant goes through three steps: `prepare` once per model (quantize, calibrate, convert), `load` once per input
shape and number of threads, `bind` once per input. What is timed is the call that `bind` returns: from input tensors in
the contestant's own form (torch or NumPy) to its own output.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxq
from benchmarks.timing import Call

Inputs = tuple[Tensor, ...]
Bind = Callable[[Inputs], Call]
Load = Callable[[Inputs, int], Bind]


@dataclass(frozen=True, eq=False)
class Model:
    """A float model in eval mode and batches to calibrate on; its first `dynamic` dimensions vary in size.

    dynamic: more than 1 is that of a transformer. fixed: no size varies.
    """

    name: str
    module: nn.Module
    calibration: list[Inputs]
    folder: Path
    dynamic: int = 1
    fixed: bool = False
    _made: dict[str, Any] = field(default_factory=dict)

    def once(self, make: Callable[[Model], Any]) -> Any:
        """The result of make(self), made once for all contestants that need it."""
        if make.__name__ not in self._made:
            self._made[make.__name__] = make(self)
        return self._made[make.__name__]

    def sizes(self) -> tuple[dict[int, Any], ...] | None:
        """The dimensions that may vary, input by input, as torch.export wants them."""
        if self.fixed:
            return None
        dims = {i: torch.export.Dim(f"size{i}") for i in range(self.dynamic)}
        return (dims,) * len(self.calibration[0])


def to_tensor(output: Any) -> Tensor:
    """The one float output of any contestant."""
    while not isinstance(output, Tensor):
        output = torch.as_tensor(output) if hasattr(output, "dtype") else output[0]
    return output.clone()


def _module(module: Callable[..., Any]) -> Load:
    """A torch module; threads are set from outside."""
    return lambda example, threads: lambda inputs: functools.partial(module, *inputs)


def float32(model: Model) -> Load:
    """Torch eager, as the user wrote it."""
    return _module(model.module)


def fxq_w8a8(model: Model) -> Load:
    """`fxq.quantize` with its default recipe, calibrated."""
    return _module(
        fxq.quantize(
            model.module, model.calibration[0], calibration_data=model.calibration, on_low_sqnr="ignore", progress=False
        )
    )


def fxq_without_calibration(recipe: str, model: Model) -> Load:
    """`fxq.quantize` with a recipe that needs no calibration data; what has no form in it stays float."""
    return _module(
        fxq.quantize(model.module, model.calibration[0], recipe=recipe, on_low_sqnr="ignore", progress=False)
    )


def torch_quantized(model: Model) -> nn.Module:
    """torch.ao.quantization, static, x86 engine: graph mode; where that cannot trace, eager mode, layer by layer.

    Convolutions among them where the model does not look into them.
    """
    import torch.ao.quantization as ao
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    if model.dynamic == 1:
        graph = prepare_fx(model.module, ao.get_default_qconfig_mapping("x86"), model.calibration[0])
        _observe(graph, model.calibration)
        return convert_fx(graph)

    def layer_by_layer(*kinds: type[nn.Module]) -> nn.Module:
        module = copy.deepcopy(model.module)
        layers = dict.fromkeys(kinds, ao.get_default_qconfig("x86"))  # type: ignore[no-untyped-call]
        ao.propagate_qconfig_(module, layers)  # type: ignore[no-untyped-call]
        ao.prepare(ao.add_quant_dequant(module), inplace=True)  # type: ignore[no-untyped-call]
        _observe(module, model.calibration)
        converted: nn.Module = ao.convert(module)  # type: ignore[no-untyped-call]
        return converted

    try:
        return layer_by_layer(nn.Linear, nn.Conv1d, nn.Conv2d)
    except (AttributeError, AssertionError):  # the model looks into a convolution, which is not itself any more
        return layer_by_layer(nn.Linear)


def torch_static(model: Model) -> Load:
    """torch.ao, static."""
    return _module(model.once(torch_quantized))


def _observe(module: Callable[..., Any], calibration: list[Inputs]) -> None:
    with torch.no_grad():
        for inputs in calibration:
            module(*inputs)


def torch_dynamic(model: Model) -> Load:
    """torch.ao.quantization.quantize_dynamic of all linears, x86 engine."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = "x86"
    module = quantize_dynamic(model.module, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return _module(module)


def torch_pt2e(model: Model) -> Load:
    """torchao's PT2E with the X86InductorQuantizer, then torch.compile with frozen weights."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(model.module, model.calibration[0], dynamic_shapes=model.sizes())
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    _observe(prepared, model.calibration)
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    compiled: Callable[..., Any] = torch.compile(converted, dynamic=False)
    config.freezing = True
    torch._dynamo.config.recompile_limit = 64  # one program for each shape and number of threads

    def load(example: Inputs, threads: int) -> Bind:
        with torch.inference_mode():
            compiled(*example)
        return lambda inputs: functools.partial(compiled, *inputs)

    return load


def onnx_file(model: Model) -> Path:
    """The float model as ONNX, all sizes that may vary left open."""
    path = model.folder / "float.onnx"
    names = [f"x{i}" for i in range(len(model.calibration[0]))]
    torch.onnx.export(
        model.module,
        model.calibration[0],
        path,
        dynamo=True,
        dynamic_shapes=model.sizes(),
        input_names=names,
        verbose=False,
        external_data=False,
    )
    return path


def onnx_prepared(model: Model) -> Path:
    """The ONNX file with shapes inferred and constants folded, as ONNX Runtime's quantizer asks for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = model.folder / "prepared.onnx"
    quant_pre_process(model.once(onnx_file), path, skip_symbolic_shape=True)
    return path


def _session(path: Path) -> Load:
    import onnxruntime

    def load(example: Inputs, threads: int) -> Bind:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda inputs: functools.partial(session.run, None, _feed(inputs))

    return load


def _feed(inputs: Inputs) -> dict[str, Any]:
    return {f"x{i}": value.numpy() for i, value in enumerate(inputs)}


def convolves(module: nn.Module) -> bool:
    """Whether a network is a convolutional one: with batch norms of images."""
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def ort_float(model: Model) -> Load:
    """ONNX Runtime, float32."""
    return _session(model.once(onnx_file))


def onnx_quantized(model: Model) -> Path:
    """ONNX Runtime's static quantization, QDQ, uint8 activations and int8 weights per channel.

    Of a transformer the products only; of a convolutional network all that it can quantize.
    """
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        """The calibration batches, one at a time."""

        def __init__(self) -> None:
            self.feeds = map(_feed, model.calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    path = model.folder / "static.onnx"
    q.quantize_static(
        model.once(onnx_prepared),
        path,
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        op_types_to_quantize=None if convolves(model.module) else ["MatMul", "Gemm", "Conv", "ConvTranspose"],
        extra_options={"MatMulConstBOnly": True},
    )
    return path


def ort_static(model: Model) -> Load:
    """ONNX Runtime, static."""
    return _session(model.once(onnx_quantized))


def ort_dynamic(model: Model) -> Load:
    """ONNX Runtime, dynamic, int8 weights per channel."""
    import onnx
    from onnxruntime import quantization as q

    graph = onnx.load(model.once(onnx_prepared))
    graph.graph.ClearField("value_info")  # the quantizer transposes weights and trips over their recorded shapes
    path = model.folder / "dynamic.onnx"
    options = {"MatMulConstBOnly": True}
    q.quantize_dynamic(graph, path, per_channel=True, weight_type=q.QuantType.QInt8, extra_options=options)
    return _session(path)


def openvino_model(model: Model) -> Any:
    """OpenVINO's own conversion of the torch model."""
    import openvino

    return openvino.convert_model(model.module, example_input=model.calibration[0])


def _compiled(graph: Any, **options: str) -> Load:
    import openvino

    def load(example: Inputs, threads: int) -> Bind:
        fixed = graph.clone()
        fixed.reshape({port: list(value.shape) for port, value in zip(fixed.inputs, example, strict=True)})
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        request = openvino.compile_model(fixed, "CPU", config).create_infer_request()
        share = {"share_inputs": True, "share_outputs": True}
        return lambda inputs: functools.partial(request.infer, [value.numpy() for value in inputs], **share)

    return load


def openvino_float(model: Model) -> Load:
    """OpenVINO, float32 throughout."""
    return _compiled(model.once(openvino_model), INFERENCE_PRECISION_HINT="f32")


def openvino_default(model: Model) -> Load:
    """OpenVINO as it comes: bfloat16 where the processor has it."""
    return _compiled(model.once(openvino_model))


def openvino_quantized(model: Model) -> Any:
    """OpenVINO's conversion, quantized by NNCF."""
    import nncf

    data = nncf.Dataset([[value.numpy() for value in inputs] for inputs in model.calibration])
    kind = nncf.ModelType.TRANSFORMER if model.dynamic > 1 else None
    graph = model.once(openvino_model).clone()
    return nncf.quantize(graph, data, model_type=kind, subset_size=len(model.calibration))


def openvino_int8(model: Model) -> Load:
    """OpenVINO, int8."""
    return _compiled(model.once(openvino_quantized))


PEERS: dict[str, Callable[[Model], Load]] = {
    "fxq": fxq_w8a8,
    **{f"fxq {recipe}": functools.partial(fxq_without_calibration, recipe) for recipe in ("w8a8-dynamic", "w8a32")},
    "torch float32": float32,
    "torch.ao static": torch_static,
    "torch.ao dynamic": torch_dynamic,
    "ORT float32": ort_float,
    "ORT static int8": ort_static,
    "ORT dynamic int8": ort_dynamic,
    "OpenVINO float32": openvino_float,
    "OpenVINO default": openvino_default,
    "OpenVINO NNCF int8": openvino_int8,
}
SLOW_TO_BUILD: dict[str, Callable[[Model], Load]] = {"torchao PT2E static": torch_pt2e}
"""Compiled anew for each shape and number of threads, a minute for a transformer: only with --full."""
