"""Charts as a reader sees them: names that can be read."""

import re
import xml.etree.ElementTree as ET

from headway.lab.svg import TOP, Mark, heat_maps, xy_chart


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


def test_heat_maps_stand_in_the_order_of_their_names_and_show_each_share():
    maps = {
        ("dense", "direct"): [[0.0, 0.25], [1.0, 0.5]],
        ("flat", "last"): [[0.1, 0.2], [0.3, 0.4]],
    }
    picture = ET.fromstring(heat_maps(maps, "% by size & design"))
    shown = [(r.find("title").text, r.get("fill")) for r in picture.iter("rect")]
    assert shown[0] == ("dense, direct, 1 × 1: 0.0%", "rgb(255,255,255)")
    assert shown[2] == ("dense, direct, 2 × 1: 100.0%", "rgb(37,99,168)")
    assert [title for title, _ in shown][4:6] == [
        "flat, last, 1 × 1: 10.0%",
        "flat, last, 1 × 2: 20.0%",
    ]
    at = {
        r.find("title").text: (float(r.get("x")), float(r.get("y"))) for r in picture.iter("rect")
    }
    first, second = at["dense, direct, 2 × 2: 50.0%"], at["flat, last, 2 × 2: 40.0%"]
    assert second[0] > first[0] and second[1] > first[1]
    texts = [t.text for t in picture.iter("text")]
    assert {"dense", "flat", "direct", "last", "% by size & design", "25", "40"} <= set(texts)
    _, _, width, height = map(float, picture.get("viewBox").split())
    assert all(x + 30 <= width and y + 30 <= height for x, y in at.values())
    assert heat_maps({}, "nothing") == ""
