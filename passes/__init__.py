"""The passes, in order. Open any one of them and find the whole pass.

- (trace) functionalize, fold_constants, normalize_moves, remove_identities, normalize_pointwise, rewrite_einsum,
  rewrite_products, normalize_linears, fold_bias, normalize_convolutions, normalize_pools, recognize_attention,
  simplify_masks, split_linears, fold_batch_norm, rewrite_batch_norm, annotate, judge_costs: FLOAT
- (to train: keep_dropout first, make_trainable after observe; then the model is trained)
- observe (then calibration data runs): OBSERVED
- (what torch has quantized: import_quantized makes pairs of it, and it goes on as QDQ)
- end_training, equalize, balance, scale_rows, judge_attention, judge_lookup, judge_tables, share_ranges,
  fit_products (round_weights, correct_bias): OBSERVED
- calibrate, fuse_linear_relu, fold_qdq: QDQ
- lower, use_fixed_point, fuse_residual, fuse_conv_add, fuse_activation, fuse_feed_forward, fuse_norm, fuse_embeddings,
  order_channels, fuse_gates, fuse_chains, merge_linears, fold_heads, prune, fuse_blocks, fuse_images: INTEGER
"""

from fxq.pipeline import Pass
from passes import (
    annotate,
    balance,
    calibrate,
    correct_bias,
    end_training,
    equalize,
    fit_products,
    fold_batch_norm,
    fold_bias,
    fold_constants,
    fold_heads,
    fold_qdq,
    functionalize,
    fuse_activation,
    fuse_blocks,
    fuse_chains,
    fuse_conv_add,
    fuse_embeddings,
    fuse_feed_forward,
    fuse_gates,
    fuse_images,
    fuse_linear_relu,
    fuse_norm,
    fuse_residual,
    import_quantized,
    judge_attention,
    judge_costs,
    judge_lookup,
    judge_tables,
    keep_dropout,
    lower,
    make_trainable,
    merge_linears,
    normalize_convolutions,
    normalize_linears,
    normalize_moves,
    normalize_pointwise,
    normalize_pools,
    observe,
    order_channels,
    prune,
    recognize_attention,
    remove_identities,
    rewrite_batch_norm,
    rewrite_einsum,
    rewrite_products,
    round_weights,
    scale_rows,
    share_ranges,
    simplify_masks,
    split_linears,
    use_fixed_point,
)

NORMALIZE: tuple[Pass, ...] = (
    normalize_moves.PASS,
    remove_identities.PASS,
    normalize_pointwise.PASS,
    rewrite_einsum.PASS,
    rewrite_products.PASS,
    normalize_linears.PASS,
    fold_bias.PASS,
    normalize_convolutions.PASS,
    normalize_pools.PASS,
)
"""To one spelling for every operation."""

LOWER: tuple[Pass, ...] = (
    fuse_linear_relu.PASS,
    fold_qdq.PASS,
    lower.PASS,
    use_fixed_point.PASS,
    fuse_residual.PASS,
    fuse_conv_add.PASS,
    fuse_activation.PASS,
    fuse_feed_forward.PASS,
    fuse_norm.PASS,
    fuse_embeddings.PASS,
    order_channels.PASS,
    fuse_gates.PASS,
    fuse_chains.PASS,
    merge_linears.PASS,
    fold_heads.PASS,
    prune.PASS,
)
"""From quantize/dequantize pairs to integers."""

PREPARE: tuple[Pass, ...] = (
    functionalize.PASS,
    fold_constants.PASS,
    *NORMALIZE,
    recognize_attention.PASS,
    simplify_masks.PASS,
    split_linears.PASS,
    fold_batch_norm.PASS,
    rewrite_batch_norm.PASS,
    annotate.PASS,
    judge_costs.JudgeCosts(annotate.PASS, (observe.PASS, calibrate.PASS, *LOWER)),
    observe.PASS,
)
"""From the float trace to a graph that is ready for calibration data."""

PREPARE_QAT: tuple[Pass, ...] = (
    keep_dropout.PASS,
    functionalize.PASS,
    fold_constants.TRAINABLE,
    *NORMALIZE,
    recognize_attention.PASS,
    simplify_masks.PASS,
    split_linears.TRAINABLE,
    fold_batch_norm.TRAINABLE,
    annotate.PASS,
    observe.PASS,
    make_trainable.PASS,
)
"""From the float trace to a graph that is ready to be trained."""

CONVERT: tuple[Pass, ...] = (
    end_training.PASS,
    equalize.PASS,
    balance.PASS,
    scale_rows.PASS,
    judge_attention.PASS,
    judge_lookup.PASS,
    judge_tables.PASS,
    share_ranges.PASS,
    fit_products.FitProducts((round_weights.METHOD, correct_bias.METHOD)),
    calibrate.PASS,
    *LOWER,
    fuse_blocks.PASS,
    fuse_images.PASS,
    fuse_chains.SINGLE,
)
"""From a graph that has seen data, or was trained, to integers."""

IMPORT: tuple[Pass, ...] = (
    functionalize.PASS,
    fold_constants.PASS,
    *NORMALIZE,
    import_quantized.PASS,
    *LOWER,
    fuse_blocks.PASS,
    fuse_images.PASS,
    fuse_chains.SINGLE,
)
"""From the trace of a model that torch has quantized to integers; with fxq's own roundings."""

_EXACT: dict[Pass, Pass] = {
    import_quantized.PASS: import_quantized.EXACT,
    normalize_pools.PASS: normalize_pools.APART,
}
IMPORT_EXACT: tuple[Pass, ...] = tuple(_EXACT.get(step, step) for step in IMPORT)
"""The same with the roundings of torch's engines."""
