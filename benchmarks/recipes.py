"""Every recipe on one small model beside torch's own in float, of the same type of activations.

    python -m benchmarks.recipes [--seconds S]

The model is linear, relu, linear of 1024 channels; times are medians, ratios are medians of the ratios within a round:
above 1 fxq is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import fxq
from benchmarks.models import mlp, silence
from benchmarks.timing import Call, interleave, median_us, ratio
from fxq.recipe import Recipe

WIDTH, ROWS = 1024, (1, 64)
RECIPES = (
    (Recipe.of("w8a8"), torch.float32),
    (Recipe(requant="fixed"), torch.float32),
    (Recipe.of("w8a8-dynamic"), torch.float32),
    (Recipe.of("w8a32"), torch.float32),
    (Recipe.of("w8a16"), torch.bfloat16),
    (Recipe.of("w8a16"), torch.float16),
)


def run(seconds: float = 2.0, threads: tuple[int, ...] = (1, 2)) -> Any:
    """A row for each recipe, type and number of rows, as they go into the JSON file; prints a line for each.

    seconds: for each number of rows.
    """
    models: dict[tuple[str, torch.dtype], torch.nn.Module] = {}
    for dtype in dict.fromkeys(dtype for _, dtype in RECIPES):
        models["float", dtype] = mlp(WIDTH, WIDTH, WIDTH).to(dtype)
    for recipe, dtype in RECIPES:
        example = torch.randn(64, WIDTH, dtype=dtype)
        with silence():
            models[recipe.title, dtype] = fxq.quantize(models["float", dtype], example, recipe=recipe)
    rows = []
    for m in ROWS:
        x = torch.randn(m, WIDTH)
        calls: dict[tuple[str, torch.dtype, int], Call] = {
            (*key, count): _call(model, x.to(key[1])) for key, model in models.items() for count in threads
        }
        times = interleave(calls, seconds, before=lambda key: torch.set_num_threads(key[2]))
        for recipe, dtype in RECIPES:
            row: dict[str, Any] = {"recipe": recipe.title, "dtype": str(dtype).removeprefix("torch."), "M": m}
            own = {count: times[recipe.title, dtype, count] for count in threads}
            real = {count: times["float", dtype, count] for count in threads}
            row["threads"] = {
                str(count): {
                    "us": median_us(own[count]),
                    "float us": median_us(real[count]),
                    "ratio": ratio(real[count], own[count]),
                }
                for count in threads
            }
            rows.append(row)
            print(f"  {' | '.join(cells(row))}", flush=True)
    return {"K": WIDTH, "N": WIDTH, "rows": rows}


def _call(model: torch.nn.Module, x: torch.Tensor) -> Call:
    return lambda: model(x)


def cells(row: Any) -> Iterator[str]:
    """A row of the table."""
    yield from (row["recipe"], row["dtype"], str(row["M"]))
    for result in row["threads"].values():
        yield from (f"{result['us']:.1f}", f"{result['float us']:.1f}", f"{result['ratio']:.2f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of rows")
    run(parser.parse_args().seconds)
