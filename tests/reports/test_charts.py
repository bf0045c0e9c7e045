from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from permed_compute.reports.charts import Bar, Group, Step, grouped_bars, horizontal_bars, steps


def drawn(svg: str, css: str) -> list[dict[str, str]]:
    return [element.attrib for element in ElementTree.fromstring(svg).iter() if css in element.get("class", "").split()]


def test_lengths_are_shares_of_the_longest() -> None:
    svg = horizontal_bars([Bar("read", 5.0, "5 s"), Bar("infer", 20.0, "20 s"), Bar("none", 0.0, "0 s")], "Stages")
    assert [bar["width"] for bar in drawn(svg, "bar")] == ["25.00%", "100.00%", "0.00%"]


def test_each_group_has_its_own_scale_and_whiskers_span_low_to_high() -> None:
    svg = grouped_bars(
        [
            Group("submits", [Bar("ours", 50, "50", 40, 100), Bar("bare", 80, "80", tone="peer")], "more is better"),
            Group("start", [Bar("ours", 2, "2 s")]),
        ],
        "Benchmarks",
    )
    assert [bar["width"] for bar in drawn(svg, "bar")] == ["50.00%", "80.00%", "100.00%"]
    whisker = drawn(svg, "whisker")[0]
    assert (whisker["x1"], whisker["x2"]) == ("40.00%", "100.00%")
    assert len(drawn(svg, "peer")) == 1


def test_words_are_escaped_and_the_title_is_read_first() -> None:
    root = ElementTree.fromstring(horizontal_bars([Bar("<b>&", 1, "1")], "A & B"))
    assert root[0].tag == "title" and root[0].text == "A & B"
    assert root.attrib["role"] == "img"
    assert "<b>&" in [element.text for element in root]


def test_nothing_to_draw_is_drawn_without_a_division_by_zero() -> None:
    ElementTree.fromstring(horizontal_bars([], "Nothing"))
    ElementTree.fromstring(grouped_bars([Group("zero", [Bar("a", 0.0, "0", 0.0, 0.0)])], "Zero"))


def test_a_step_holds_its_value_until_the_next_and_the_longest_curve_gives_the_axis() -> None:
    svg = steps(
        [Step("low", [2.0, 4.0], [0.5, 0.25]), Step("high", [1.0], [0.0], tone="bad")], "Survival", unit="years"
    )
    low, high = (line["points"] for line in drawn(svg, "line") if "points" in line)
    assert low == "0,0 500.0,0.00 500.0,50.00 1000.0,50.00 1000.0,75.00"
    assert high == "0,0 250.0,0.00 250.0,100.00"
    assert "4 years" in [element.text for element in ElementTree.fromstring(svg).iter()]
    assert len(drawn(svg, "bad")) == 2  # the curve and its line in the legend
    ElementTree.fromstring(steps([], "Nothing"))
