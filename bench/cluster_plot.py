"""docs/cluster.svg: step times over the rate of the links, and bytes over k. Plain SVG, no library."""


def svg(rows: list[dict]) -> str:
    return ""
