"""The passes, in order. Open any one of them and find the whole pass.

- (trace) normalize, fold_batch_norm, annotate: FLOAT
- observe (then calibration data runs): OBSERVED
- calibrate, fuse_linear_relu, fold_qdq: QDQ
- lower, fuse_chains, prune: INTEGER
"""

from fxq.pipeline import Pass
from passes import (
    annotate,
    calibrate,
    fold_batch_norm,
    fold_qdq,
    fuse_chains,
    fuse_linear_relu,
    lower,
    normalize,
    observe,
    prune,
)

PREPARE: tuple[Pass, ...] = (normalize.PASS, fold_batch_norm.PASS, annotate.PASS, observe.PASS)
"""From the float trace to a graph that is ready for calibration data."""

CONVERT: tuple[Pass, ...] = (
    calibrate.PASS,
    fuse_linear_relu.PASS,
    fold_qdq.PASS,
    lower.PASS,
    fuse_chains.PASS,
    prune.PASS,
)
"""From a graph that has seen data to integers."""
