"""Small charts as SVG text: points and lines over two axes, intervals of a list of names, and heat
maps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 620, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
COLOURS = 8
"""Classes c0 … c7 of the style."""


@dataclass(frozen=True)
class Mark:
    """A line through points, or single points."""

    points: Sequence[tuple[float, float]]
    colour: int
    name: str
    """What a pointer over it shows."""
    thin: bool = False
    dots: bool = False
    label: str = ""
    """Written beside the last point."""
    below: bool = False
    """Where the label is, rather than above the point."""
    band: bool = False
    """Fill what the line encloses."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Format a number for an axis, as 3M or 1.25."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.5g}{unit}"
    return f"{value:.5g}"


def power_of_ten(value: float) -> str:
    """Format 10^value for a logarithmic axis, as 1e18 or 3e18."""
    return f"{10**value:.2g}".replace("e+0", "e").replace("e+", "e")


def xy_chart(marks: Iterable[Mark], x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """Return a chart of marks with finite points; "" where there are none. A logarithmic x needs
    values above 0."""
    marks = [m for m in marks if m.points]
    if log_x:
        marks = [replace(m, points=[(math.log10(x), y) for x, y in m.points]) for m in marks]
    x_text = power_of_ten if log_x else short
    points = [point for mark in marks for point in mark.points]
    if not points:
        return ""
    (x0, x1), (y0, y1) = (_range(values) for values in zip(*points, strict=True))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts, labels = [_open(HEIGHT, f"{y_label} over {x_label}")], list[_Label]()
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(_text(LEFT - 6, y + 4, short(value), "end"))
    for value in ticks(x0, x1):
        x, _ = at(value, y0)
        parts.append(_line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4, "grid"))
        parts.append(_text(x, HEIGHT - BOTTOM + 17, x_text(value), "middle"))
    for mark in marks:
        places = [at(*point) for point in mark.points]
        title, colour = f"<title>{escape(mark.name)}</title>", f"c{mark.colour % COLOURS}"
        if mark.dots or len(places) == 1:
            parts += [
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
                for x, y in places
            ]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            tag = "polygon" if mark.band else "polyline"
            kind = "band" if mark.band else "thin" if mark.thin else "thick"
            parts.append(f'<{tag} class="{kind} {colour}" points="{path}">{title}</{tag}>')
        if mark.label:
            x, y = places[-1]
            end = "end" if x > WIDTH * 0.7 else "start"
            down = 16 if mark.below else -8
            across = x + (-8 if end == "end" else 8)
            labels.append(_Label(across, y + down, mark.label, end, colour))
    parts += [_text(*label) for label in _apart(labels)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(_text(6, 11, y_label, "start"))
    return "".join([*parts, "</svg>"])


class _Label(NamedTuple):
    x: float
    y: float
    text: str
    anchor: str
    colour: str

    def over(self, other: "_Label") -> bool:
        """Return whether two texts lie over each other, at some 6.5 × 12 per letter."""
        (a, b), (c, d) = self._span(), other._span()
        return abs(self.y - other.y) < 12 and a < d and c < b

    def _span(self) -> tuple[float, float]:
        width = 6.5 * len(self.text)
        left = self.x - width if self.anchor == "end" else self.x
        return left, left + width


def _apart(labels: Sequence[_Label]) -> list[_Label]:
    """Return labels from the lowest up, each as far above its place as the others need; one that
    would leave the chart stays."""
    placed: list[_Label] = []
    for label in sorted(labels, key=lambda label: -label.y):
        moved = label
        while moved.y > TOP and any(map(moved.over, placed)):
            moved = moved._replace(y=moved.y - 1)
        placed.append(moved if moved.y > TOP else label)
    return placed


def forest(
    rows: Sequence[tuple[str, float, Sequence[tuple[float, float]], Sequence[float]]], x_label: str
) -> str:
    """Return intervals around means, a row each: name, mean, intervals (the first is drawn thick),
    and the single values."""
    numbers = [x for _, m, spans, dots in rows for x in (m, *sum(spans, ()), *dots, 0.0)]
    if not rows:
        return ""
    (x0, x1), left = _range(numbers), 170
    height = 58 + 44 * len(rows)

    def at(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (WIDTH - left - RIGHT)

    parts = [_open(height, "paired differences with intervals")]
    for value in ticks(x0, x1):
        parts.append(_line(at(value), 8, at(value), height - 48, "grid"))
        parts.append(_text(at(value), height - 32, f"{value:+.3g}" if value else "0", "middle"))
    parts.append(_line(at(0), 8, at(0), height - 48, "zero"))
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 10, x_label, "middle"))
    for i, (name, mean, spans, dots) in enumerate(rows):
        y, colour = 30 + 44 * i, f"c{(i + 1) % COLOURS}"
        parts.append(_text(8, y + 4, name[:24], "start"))
        for low_high, kind, down in zip(spans, ("thick", "thin"), (0, 9), strict=False):
            low, high = (at(x) for x in low_high)
            parts.append(_line(low, y + down, high, y + down, f"{kind} {colour}"))
        parts += [
            f'<circle class="seed" cx="{at(x):.1f}" cy="{y - 9}" r="2.5">'
            f"<title>{x:+.4f}</title></circle>"
            for x in dots
        ]
        parts.append(
            f'<circle class="dot {colour}" cx="{at(mean):.1f}" cy="{y}" r="5">'
            f"<title>{escape(name)} {mean:+.4f}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def heat_maps(maps: Mapping[tuple[str, str], Sequence[Sequence[float]]], caption: str) -> str:
    """Return heat maps of shares from 0 to 1, whose rows and columns are numbered from 1; "" where
    there are none.

    Args:
        maps: where a map stands, by the names of its row and its column → its values, row by row;
            all of one size."""
    if not maps:
        return ""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*maps, strict=True))
    (n_down, n_across), side = _size(maps), 30
    left, top, gap = 100, 40, 26
    across, down = n_across * side + gap, n_down * side + gap
    width, height = left + len(columns) * across, top + len(rows) * down + 18
    parts = [_open(height, caption, width)]
    parts += [_text(left + i * across, 14, name, "start") for i, name in enumerate(columns)]
    parts += [_text(8, top + i * down + 20, name, "start") for i, name in enumerate(rows)]
    for (row, column), values in maps.items():
        x0, y0 = left + columns.index(column) * across, top + rows.index(row) * down
        for i, line in enumerate(values):
            parts.append(_text(x0 - 5, y0 + i * side + 20, str(i + 1), "end"))
            for j, share in enumerate(line):
                x, y = x0 + j * side, y0 + i * side
                red, green, blue = (round(255 - share * (255 - c)) for c in (0x25, 0x63, 0xA8))
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" '
                    f'fill="rgb({red},{green},{blue})"><title>{escape(f"{row}, {column}")}, '
                    f"{i + 1} × {j + 1}: {share:.1%}</title></rect>"
                    f'<text x="{x + side / 2 - 0.5}" y="{y + 19}" text-anchor="middle" '
                    f'style="fill:{"#fff" if share > 0.5 else "#222"}">{100 * share:.0f}</text>'
                )
        parts += [
            _text(x0 + j * side + side / 2, y0 - 5, str(j + 1), "middle") for j in range(n_across)
        ]
    parts.append(_text(left, height - 8, caption, "start"))
    return "".join([*parts, "</svg>"])


def _size(maps: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> tuple[int, int]:
    """Return the rows and columns that all maps have."""
    ((n_down, n_across),) = {(len(m), len(line)) for m in maps.values() for line in m}
    return n_down, n_across


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Return the range of values with a margin, never empty."""
    values = list(values)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _open(height: int, label: str, width: int = WIDTH) -> str:
    box = f"0 0 {width} {height}"
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="{box}">'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "") -> str:
    kind = f' class="name {colour}"' if colour else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
