"""Numbers as people read them: sensible digits, units, a true minus sign, a dash for what was not measured."""

from __future__ import annotations

import math

MISSING = "—"
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` to so many significant digits, never in exponent form between 0.001 and a billion."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return _minus(str(value))
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # before the magnitude is read: 99.96 is written 100, not 100.0
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude <= 9:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(f"{value:,.{max(0, digits - 1 - magnitude)}f}")


def span(low: float | None, high: float | None, decimals: int | None = None) -> str:
    """From the least to the most, with so many decimals; nothing where they were not measured."""
    if low is None or high is None:
        return ""
    ends = (significant(end) if decimals is None else fixed(end, decimals) for end in (low, high))
    return " to ".join(ends)


def fixed(value: float | None, decimals: int) -> str:
    """``value`` with so many decimals."""
    return MISSING if value is None else _minus(f"{value:.{decimals}f}")


def size(value: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    if value is None:
        return MISSING
    scaled, unit = float(value), 0
    while abs(scaled) >= 1024 and unit < len(_SIZES) - 1:
        scaled, unit = scaled / 1024, unit + 1
    return f"{significant(scaled)} {_SIZES[unit]}"


def milliseconds(value: float | None) -> str:
    """A time in ms, in s from ten seconds on."""
    if value is None:
        return MISSING
    return f"{significant(value / 1000)} s" if value >= 10_000 else f"{significant(value)} ms"


def percent_change(value: float, base: float) -> str:
    """Change against ``base`` in percent with its sign; one decimal below 10 %."""
    if base == 0 or not (math.isfinite(value) and math.isfinite(base)):
        return MISSING
    change = 100 * (value - base) / abs(base)
    text = f"{change:+.1f}" if abs(change) < 9.95 else f"{change:+.0f}"
    return "0 %" if float(text) == 0 else _minus(f"{text} %")


def ratio_to(value: float, base: float) -> str:
    """How many times ``base``."""
    return f"×{significant(value / base)}" if base else MISSING


def nats_more(value: float, base: float) -> str:
    """How many nats more than ``base``, with its sign."""
    return MISSING if not (math.isfinite(value) and math.isfinite(base)) else _minus(f"{value - base:+.3f}")


def _minus(text: str) -> str:
    return text.replace("-", "−") if "e" not in text else text
