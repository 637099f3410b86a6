"""Pictures of the results, in a light and a dark style; needs matplotlib.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; every series also has its own marker.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

try:
    import matplotlib
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ValueError("pictures need matplotlib: pip install matplotlib") from error

from .harness import between

Row = dict[str, Any]
MARKERS = "os^DvPX*<>"
STYLES = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "grid": "#d8dde3",
        "series": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2328"),
    },
    "dark": {
        "paper": "#14171c",
        "ink": "#e6e9ee",
        "grid": "#363c45",
        "series": ("#56b4e9", "#e69f00", "#2fbf94", "#e19ac1", "#f0e442", "#f0813a", "#e6e9ee"),
    },
}


class Picture(NamedTuple):
    """A picture: its name in file names, its caption, its size in inches, and the function that draws it."""

    name: str
    words: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]

    def svg(self, style: str) -> str:
        """The picture in the "light" or the "dark" style; the same results give the same bytes."""
        colours: Any = STYLES[style]
        ink, paper = colours["ink"], colours["paper"]
        settings: Any = {
            "figure.facecolor": paper, "savefig.facecolor": paper, "axes.facecolor": paper, "text.color": ink,
            "axes.edgecolor": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": ink,
            "ytick.color": ink, "grid.color": colours["grid"], "legend.frameon": False, "font.size": 10,
            "axes.titlesize": 10, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
            "axes.spines.right": False, "svg.hashsalt": self.name,
            "axes.prop_cycle": cycler(color=colours["series"]),
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            figure = Figure(self.size, layout="constrained")
            self.draw(figure)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return out.getvalue()


def pictures(kind: str, header: Row, rows: Sequence[Row]) -> list[Picture]:
    """The pictures for results of this kind."""
    if kind == "kernels":
        name = header.get("ours", rows[0]["provider"])
        ours = [row for row in rows if row["provider"] == name and row["flops"]]
        return [*([roofline(header, ours)] if ours else []), kernels_by_size(rows)]
    if kind == "model":
        return [model_by_batch(rows)]
    if kind == "rivals":
        return [advantage(rows)]
    return [*compiled(rows)]


def roofline(header: Row, ours: Sequence[Row]) -> Picture:
    """The FLOP/s of our kernels over their arithmetic intensity, under the device's limits."""
    ops = list(dict.fromkeys(row["op"] for row in ours))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, op in enumerate(ops):
            mine = [row for row in ours if row["op"] == op]
            x = [row["flops"] / row["bytes"] for row in mine]
            y = [row["flops"] / row["median_us"] / 1e6 for row in mine]
            axes.plot(x, y, linestyle="none", marker=MARKERS[place % len(MARKERS)], label=op, alpha=0.8)
        ends = [row["flops"] / row["bytes"] for row in ours]
        limits = header.get("limits", {})
        copy = limits.get("copy_gbps", 0) / 1e3  # TB/s
        for dtype, product in limits.get("product_tflops", {}).items():
            ridge = product / copy
            corners = sorted({min(ends) / 2, ridge, max(*ends, ridge) * 2})
            axes.plot(corners, [min(x * copy, product) for x in corners], color=matplotlib.rcParams["text.color"],
                      linewidth=1)  # fmt: skip
            rate = f"{product:.3g} TFLOP/s" if product >= 1 else f"{1e3 * product:.3g} GFLOP/s"
            axes.annotate(f"{rate} in {dtype}", (corners[-1], product), ha="right", va="bottom")
        axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, operations per byte", ylabel="TFLOP/s")
        figure.legend(loc="outside right upper")

    words = (
        f"Roofline of {ours[0]['provider']}: each point is a shape; the lines are the rates of a copy and a product."
    )
    return Picture("roofline", words, (9, 4.6), draw)


def kernels_by_size(rows: Sequence[Row]) -> Picture:
    """How close each provider comes to the limit as shapes grow, one panel per operation."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    across = min(3, len(ops))
    down = -(-len(ops) // across)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, squeeze=False, sharex=True)
        for axes in grid.flat[len(ops) :]:
            axes.remove()
        for axes, op in zip(grid.flat, ops, strict=False):
            for place, provider in enumerate(providers):
                mine = [row for row in rows if row["op"] == op and row["provider"] == provider]
                points = sorted((row["bytes"] / 1e6, 100 * row["of_limit"]) for row in mine)
                _line(axes, points, place, linestyle="none", alpha=0.8)
            highest = max(100 * row["of_limit"] for row in rows if row["op"] == op)
            axes.set(xscale="log", title=op, ylim=(0, 1.15 * highest))
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("of the limit, %")
        for axes in grid[-1]:
            axes.set_xlabel("bytes that must move, MB")
        _legend(figure, providers)

    words = "How close each provider comes to the device's limit, by the size of the operation."
    return Picture("by-size", words, (9, 1.2 + 2.4 * down), draw)


def model_by_batch(rows: Sequence[Row]) -> Picture:
    """Tokens per second over the batch size, one panel per test."""
    tests = list(dict.fromkeys(row["test"] for row in rows))
    providers = list(dict.fromkeys(_provider(row) for row in rows))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(tests), squeeze=False)
        for axes, test in zip(grid.flat, tests, strict=True):
            mine = [row for row in rows if row["test"] == test]
            for place, provider in enumerate(providers):
                theirs = sorted((row for row in mine if _provider(row) == provider), key=lambda row: row["batch"])
                if theirs:
                    speeds = [row["tokens_per_s"] for row in theirs]
                    below = [s["median"] - s["p10"] for s in speeds]
                    above = [s["p90"] - s["median"] for s in speeds]
                    axes.errorbar([row["batch"] for row in theirs], [s["median"] for s in speeds], [below, above],
                                  marker=MARKERS[place % len(MARKERS)], color=f"C{place}", capsize=3)  # fmt: skip
            allowed = sorted((row["batch"], row["tokens_per_s"]["median"] / row["of_floor"])
                             for row in mine if row["provider"] == "llama")  # fmt: skip
            if allowed:
                axes.plot(*zip(*allowed, strict=True), color=matplotlib.rcParams["text.color"], ls="--", marker="_")
            batches = sorted({row["batch"] for row in mine})
            axes.set(xscale="log", title=test, xlabel="batch, texts", ylabel="tokens/s", ylim=(0, None))
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.minorticks_off()
        _legend(figure, providers, "limit of memory and arithmetic")

    low, high = between(min(row["runs"] for row in rows))
    words = f"Tokens per second by batch size, bars from {low} to {high}; dashed, the machine's limit in our dtype."
    return Picture("by-batch", words, (max(4.5, 3.6 * len(tests)), 3.9), draw)


def compiled(rows: Sequence[Row]) -> Iterator[Picture]:
    """For each GPU: what bounds each kernel there, and its occupancy."""
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target and row.get("roofline") and row.get("occupancy")]
        if mine:
            yield _compiled(target, mine)


def _compiled(target: str, rows: Sequence[Row]) -> Picture:
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, kernel in enumerate(kernels):
            points = [(row["roofline"]["intensity"], 100 * row["occupancy"]) for row in rows if row["kernel"] == kernel]
            _line(axes, points, place, linestyle="none", alpha=0.8)
        for ridge in sorted({row["roofline"]["ridge"] for row in rows}):
            axes.axvline(ridge, color=matplotlib.rcParams["text.color"], linewidth=1)
        axes.set(xscale="log", ylim=(0, 105), xlabel="arithmetic intensity, operations per byte", ylabel="occupancy, %")
        _legend(figure, kernels)

    words = (
        f"{target}: left of a line (a dtype's ridge point) memory-bound, right of it compute-bound. Nothing was run."
    )
    return Picture(f"{target}.occupancy", words, (9, 4.4), draw)


def advantage(rows: Sequence[Row]) -> Picture:
    """How many times as good as the last provider each other one is, by medians."""
    compared = [row for row in rows if isinstance(row.get("median"), dict) and len(row["median"]) > 1]
    providers = list(dict.fromkeys(name for row in compared for name in list(row["median"])[:-1]))
    labels = []
    for row in compared:
        parts = [row["what"], row.get("dtype"), f"threads: {row['threads']}" if "threads" in row else None]
        labels.append(f"{', '.join(filter(None, parts))} (over {list(row['median'])[-1]})")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, provider in enumerate(providers):
            points = []
            for height, row in enumerate(compared):
                if provider in list(row["median"])[:-1]:
                    ratio = row["median"][provider] / list(row["median"].values())[-1]
                    points.append((ratio if "/s" in row["unit"] else 1 / ratio, height))
            _line(axes, points, place, linestyle="none")
        axes.axvline(1, color=matplotlib.rcParams["text.color"], linewidth=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set(xlabel="times as good in the median; right of 1 is better", xlim=(0, None))
        _legend(figure, providers)

    words = "How many times as fast, or as small, each provider is as the one named beside the row."
    return Picture("advantage", words, (9, 1.3 + 0.27 * len(compared)), draw)


def _provider(row: Row) -> str:
    return f"{row['provider']} ({row['backend']})"


def _line(axes: Axes, points: Iterable[tuple[float, float]], place: int, **style: Any) -> None:
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    axes.plot(x, y, marker=MARKERS[place % len(MARKERS)], color=f"C{place}", **style)


def _legend(figure: Figure, names: Sequence[str], dashed: str | None = None) -> None:
    """One legend below all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker=MARKERS[place % len(MARKERS)], color=f"C{place}", label=name)
               for place, name in enumerate(names)]  # fmt: skip
    if dashed:
        handles.append(Line2D([], [], color=matplotlib.rcParams["text.color"], linestyle="--", label=dashed))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
