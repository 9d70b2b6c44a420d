"""Draw the plots of docs/how-int8-inference-works.md: docs/pictures/errors.svg and range.svg.

python docs/numerics_pictures.py        # needs matplotlib (the extra "bench")
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent / "pictures"
BLUE, RED, GREY = "#2166ac", "#b2182b", "#777777"


def steps_of(x: np.ndarray, limit: float) -> np.ndarray:
    """x quantized to [-limit, limit] in 256 steps with zero point 128, in real units again."""
    s = 2 * limit / 255
    return np.asarray(s * (np.clip(np.rint(x / s) + 128, 0, 255) - 128))


def save(figure: plt.Figure, name: str) -> None:
    """As svg without a date, so that the same numbers give the same file; and png where asked for by the name."""
    figure.tight_layout()
    figure.savefig(FOLDER / name, metadata={"Date": None} if name.endswith("svg") else None, dpi=100)


def errors(name: str) -> None:
    """The rounding error inside the range is even; values beyond the range add tails."""
    x = np.random.default_rng(0).normal(0, 1, 200_000)
    figure, axes = plt.subplots(figsize=(6.4, 3))
    bins = np.linspace(-3, 3, 61)
    for limit, colour, kind in ((5.0, BLUE, "stepfilled"), (2.2, RED, "step")):
        error = (steps_of(x, limit) - x) / (2 * limit / 255)
        label = f"range ±{limit}: {np.mean(abs(x) > limit):.1%} of the values cut off"
        axes.hist(np.clip(error, -2.99, 2.99), bins, histtype=kind, color=colour, label=label, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlabel("error in steps (the outermost bins hold all that is further out)")
    axes.set_ylabel("values of 200,000")
    axes.legend(loc="upper center", frameon=False, ncols=2, bbox_to_anchor=(0.5, 1.18))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def ranges(name: str) -> None:
    """A wide range rounds coarsely, a narrow one cuts values off: the sum has its smallest value in between."""
    x = np.append(np.random.default_rng(0).normal(0, 1, 100_000), [12.0])
    limits = np.geomspace(0.8, 16, 200)
    total, rounding = [], []
    for limit in limits:
        square = (steps_of(x, limit) - x) ** 2
        total.append(square.mean())
        rounding.append(square[abs(x) <= limit].sum() / len(x))
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.loglog(limits, total, color=RED, linewidth=2, label="all of it")
    axes.loglog(limits, rounding, color=BLUE, linestyle="--", label="from rounding")
    axes.loglog(limits, np.subtract(total, rounding).clip(1e-9), color=GREY, linestyle=":", label="from cutting off")
    best = int(np.argmin(total))
    axes.plot(limits[best], total[best], "o", color=RED)
    axes.annotate(
        f"best: ±{limits[best]:.1f}",
        (limits[best], total[best]),
        (limits[best], total[best] * 6),
        ha="center",
        arrowprops={"arrowstyle": "-", "color": GREY},
    )
    axes.set_ylim(min(rounding) / 3, 1)
    axes.set_xticks([1, 2, 4, 8, 16], ["±1", "±2", "±4", "±8", "±16"])
    axes.minorticks_off()
    axes.set_xlabel("range; 100,000 normal values and one outlier at 12")
    axes.set_ylabel("mean square error")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def main(suffix: str = "svg") -> None:
    """Both plots."""
    matplotlib.rcParams.update({"svg.hashsalt": "fxq", "svg.fonttype": "none", "font.size": 9})
    errors(f"errors.{suffix}")
    ranges(f"range.{suffix}")


if __name__ == "__main__":
    main()
