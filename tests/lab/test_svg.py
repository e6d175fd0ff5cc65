"""Charts as a reader sees them: names that can be read."""

import re

from headway.lab.svg import TOP, Mark, xy_chart


def places(chart):
    """Name of each mark → its colour and where it is written."""
    found = re.findall(r'<text class="name (c\d)" x="([\d.]+)" y="([\d.]+)".*?>(.*?)<', chart)
    return {name: (colour, float(x), float(y)) for colour, x, y, name in found}


def test_names_of_curves_that_end_together_are_apart_and_have_their_colours():
    ends = {"flat": 4.1, "heads": 4.1001, "dense": 4.0999}
    marks = [
        Mark([(0, 4.3), (1, y)], colour, name, label=name)
        for colour, (name, y) in enumerate(ends.items())
    ]
    texts = places(xy_chart(marks, "tokens", "loss"))
    assert {name: colour for name, (colour, _, _) in texts.items()} == {
        "flat": "c0", "heads": "c1", "dense": "c2",
    }  # fmt: skip
    heights = [texts[name][2] for name in ("heads", "flat", "dense")]
    assert all(12 <= low - high < 30 for high, low in zip(heights, heights[1:], strict=False))
    assert min(heights) > TOP


def test_a_name_that_is_alone_stays_beside_its_point():
    far = [Mark([(x, y)], 0, n, dots=True, label=n) for n, x, y in (("a", 0, 0), ("b", 1, 1))]
    alone = places(xy_chart(far, "x", "y"))
    crowd = places(xy_chart([*far, Mark([(0, 0)], 1, "c", dots=True, label="c")], "x", "y"))
    assert {name: crowd[name] for name in "ab"} == alone
    assert abs(crowd["c"][2] - crowd["a"][2]) >= 12
