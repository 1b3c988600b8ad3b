r"""Answers of MATH (Hendrycks et al. 2021, arXiv 2103.03874): the last \boxed{...}, compared as text after `plain`.

`plain` removes what does not change the meaning: spaces, dollar signs, degrees, percent, \left and \right, sizes of fractions,
units in \text{}, thousands separators, a final full stop, needless zeros, a name before an equals sign. Then a/b becomes
\frac{a}{b}, \frac12 \frac{1}{2} and \sqrt2 \sqrt{2}. Nothing is computed: 1/2 and 0.5 stay different, 2/4 and 1/2 too.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_GONE = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\quad|\\%|%|\\\$|\$|\\degree|\^\{?\\circ\}?|\s|\\$"  # spacing, units, money
)
_THOUSANDS = re.compile(r"^-?\d{1,3}(,\d{3})+(\.\d+)?$")  # 1,2 is two numbers
_RULES = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mbox)\{[^{}]*\}$"), ""),  # a unit at the end
    (re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"^[a-zA-Z]{1,2}="), ""),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac(\d)\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]*\})(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"^(-?)(\d+)/(\d+)$"), r"\1\\frac{\2}{\3}"),
)


def boxed(text: str) -> str:
    r"""What the last \boxed{...} (or \boxed 5, or \fbox) of a text holds; empty where there is none or it never closes."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return ""
    rest = text[start:].removeprefix(r"\boxed").removeprefix(r"\fbox")
    if not rest.startswith("{"):
        return re.match(r"\s*([^\s$.]*)", rest).group(1)  # type: ignore[union-attr]
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i]
    return ""


def plain(text: str) -> str:
    """An answer in the form in which two are compared; see above."""
    alone = text.strip()
    for pattern, by in _RULES[1:2]:  # before the spaces go: \text{ cm}
        alone = pattern.sub(by, alone.rstrip("$. ")) or alone
    alone = _GONE.sub("", alone).rstrip(".")
    for pattern, by in _RULES:
        alone = pattern.sub(by, alone) or alone
    return alone if "," in alone and not _THOUSANDS.match(alone) else number(alone) or alone


def number(text: str) -> str:
    """A number without `$`, thousands separators and needless zeros ("$1,080.00" is "1080"); empty where it is none."""
    try:
        value = Decimal(text.replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return ""
    if not value.is_finite():
        return ""
    return format(value.normalize() if value else Decimal(0), "f")
