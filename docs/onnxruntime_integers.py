"""What ONNX Runtime computes for an int8 linear: its optimized graph, and its result against integers in NumPy.

The output stands in docs/how-int8-inference-works.md. Needs `pip install onnx onnxruntime` (the extra "bench").

    python docs/onnxruntime_integers.py
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def model(w: np.ndarray, bias: np.ndarray, s_w: np.ndarray, qparams: dict[str, tuple[float, int]]) -> onnx.ModelProto:
    """x float -> QuantizeLinear -> DequantizeLinear -> Gemm -> QuantizeLinear: what exporters write."""
    (s_x, z_x), (s_y, z_y) = qparams["x"], qparams["y"]
    constants = {
        "s_x": np.float32(s_x),
        "z_x": np.uint8(z_x),
        "s_y": np.float32(s_y),
        "z_y": np.uint8(z_y),
        "w": w,
        "s_w": s_w,
        "z_w": np.zeros(len(w), np.int8),
        "b": bias,
        "s_b": (np.float32(s_x) * s_w).astype(np.float32),
        "z_b": np.zeros(len(w), np.int32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s_x", "z_x"], ["q_x"]),
        helper.make_node("DequantizeLinear", ["q_x", "s_x", "z_x"], ["dq_x"]),
        helper.make_node("DequantizeLinear", ["w", "s_w", "z_w"], ["dq_w"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "s_b", "z_b"], ["dq_b"], axis=0),
        helper.make_node("Gemm", ["dq_x", "dq_w", "dq_b"], ["y"], transB=1),
        helper.make_node("QuantizeLinear", ["y", "s_y", "z_y"], ["q_y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, w.shape[1]])],
        [helper.make_tensor_value_info("q_y", TensorProto.UINT8, [None, len(w)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Build, run, print."""
    rng = np.random.default_rng(0)
    w, bias = rng.integers(-60, 61, (16, 32)).astype(np.int8), rng.integers(-3000, 3000, 16).astype(np.int32)
    s_w, s_x, z_x, s_y, z_y = rng.uniform(0.01, 0.02, 16).astype(np.float32), 0.03, 120, 0.25, 130
    x = rng.normal(0, 1, (256, 32)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        source = model(w, bias, s_w, {"x": (s_x, z_x), "y": (s_y, z_y)}).SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
        optimized = onnx.load(options.optimized_model_filepath)
    print(f"onnxruntime {onnxruntime.__version__}; the graph that it runs:")
    types = {t.name: str(numpy_helper.to_array(t).dtype) for t in optimized.graph.initializer}
    for node in optimized.graph.node:
        operands = ", ".join(types.get(name, name) for name in node.input)
        print(f"  {node.op_type}({operands})")
    q_x = np.clip(np.rint(x / np.float32(s_x)) + z_x, 0, 255).astype(np.int64)
    acc = (q_x - z_x) @ w.T.astype(np.int64) + bias
    factor = np.float32(s_x) * s_w / np.float32(s_y)
    expected = np.clip(np.rint(acc.astype(np.float32) * factor) + z_y, 0, 255)
    off = np.count_nonzero(found != expected)
    print(f"outputs that differ from int32 sums with one float multiply: {off} of {found.size}")


if __name__ == "__main__":
    main()
