"""docs/cluster.svg: step times over the rate of the links for each k, and bytes over k, as
plain SVG."""

import math
from html import escape

COLORS = {
    "EP": "#b0b0b0",
    "EP dedup": "#d95f02",
    "EP dedup, 2 chunks": "#e6ab02",
    "LatentMoE EP": "#7570b3",
    "HP×EP": "#66a61e",
    "HP": "#1b6ca8",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 200, 56, 62, 76
Point = tuple[float, float]


def svg(rows: list[dict]) -> str:
    """The picture of the rows of a sweep."""
    swept = [r for r in rows if r["bench"] == "sweep"]
    ks = sorted({r["k"] for r in swept})
    fastest = max(r["mbit"] for r in swept)

    def lines(x: str, y: str, scale: float, **wanted: float) -> dict[str, list[Point]]:
        chosen = [r for r in swept if all(r[key] == v for key, v in wanted.items()) and r["mbit"]]
        return {
            name: sorted((r[x], r[y] * scale) for r in chosen if r["name"] == name)
            for name in COLORS
        }

    panels = [
        _panel(i, f"k = {k}", "Mbit/s per host", "ms per step", lines("mbit", "step_ms", 1, k=k))
        for i, k in enumerate(ks)
    ]
    sent = lines("k", "wire_bytes", 1e-6, mbit=fastest)
    panels.append(_panel(len(ks), "on the wire", "k", "MB per host and step", sent))
    width = LEFT + len(panels) * (WIDTH + GAP) - GAP + 20
    legend = "".join(
        f'<line x1="{LEFT + i * 150}" y1="20" x2="{LEFT + 22 + i * 150}" y2="20" stroke="{color}" '
        f'stroke-width="3"/><text x="{LEFT + 28 + i * 150}" y="24">{escape(name)}</text>'
        for i, (name, color) in enumerate(COLORS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 50}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{legend}{''.join(panels)}</svg>\n"
    )


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between both, at most about six."""
    ticks = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside if len(inside) <= 6 else inside[:: math.ceil(len(inside) / 6)]


def _panel(i: int, title: str, x_name: str, y_name: str, lines: dict[str, list[Point]]) -> str:
    """One diagram with logarithmic axes."""
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (_range([p[axis] for p in points]) for axis in (0, 1))
    left = LEFT + i * (WIDTH + GAP)

    def at(point: Point) -> tuple[str, str]:
        across = math.log(point[0] / x_low) / math.log(x_high / x_low)
        up = math.log(point[1] / y_low) / math.log(y_high / y_low)
        return f"{left + across * WIDTH:.1f}", f"{TOP + (1 - up) * HEIGHT:.1f}"

    parts = [
        f'<text x="{left + WIDTH / 2}" y="{TOP - 12}" text-anchor="middle" font-weight="bold">'
        f"{title}</text>",
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">{x_name}</text>'
        f'<text transform="translate({left - 42},{TOP + HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">{y_name}</text>',
    ]
    for tick in ticks(x_low, x_high):
        x, _ = at((tick, y_low))
        parts.append(
            f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{TOP + HEIGHT}" stroke="#e4e4e4"/>'
            f'<text x="{x}" y="{TOP + HEIGHT + 17}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in ticks(y_low, y_high):
        _, y = at((x_low, tick))
        parts.append(
            f'<line x1="{left}" y1="{y}" x2="{left + WIDTH}" y2="{y}" stroke="#e4e4e4"/>'
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for name, line in lines.items():
        places = [at(p) for p in line]
        joined = " ".join(",".join(p) for p in places)
        color = COLORS[name]
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in places]
    return "".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    """A little more than they cover."""
    return min(values) * 0.9, max(values) * 1.1
