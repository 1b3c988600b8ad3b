"""Answers of MATH: the last box, in one form."""

import pytest

from tasks import compose_task
from tasks.latex import boxed, plain


@pytest.mark.parametrize(
    "text, found",
    [
        (r"so $\boxed{2}$.", "2"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{\sqrt{3}}", r"\sqrt{3}"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{x}", "x"),
        (r"\boxed{never closed", ""),
        ("no box", ""),
    ],
)
def test_boxes(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    "one, other",
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"1{,}000", "1{,}000"),
        ("10,000", "10000"),
        (r"\$32", "32"),
        (r"25\%", "25"),
        (r"81\text{ teachers}", "81"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x = 12", "12"),
        ("0.50", ".5"),
        (r"90^\circ", "90"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        ("7.", "7"),
    ],
)
def test_equal_forms(one, other):
    assert plain(one) == plain(other) != ""


@pytest.mark.parametrize("one, other", [("1/2", "0.5"), ("1,2", "12"), ("(1,2)", "(2,1)"), ("x^2", "x2"), ("-1", "1")])
def test_what_stays_different(one, other):
    assert plain(one) != plain(other)


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        (r"thus \boxed{\frac{3}{4}}", r"\frac{3}{4}", r"\frac{3}{4}"),
        ("3 + 4 = 7\n#### 7", "", "7"),  # as a model trained on GSM8K answers
        ("it is 3, or 4.", "", "4"),
        ("nothing", "", ""),
    ],
)
def test_extraction(text, strict, flexible):
    assert compose_task("math").extract(text) == (strict, flexible)
