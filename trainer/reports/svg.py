"""Draws a curve as inline SVG, with classes that the page's style sheet colours. Knows only numbers, no report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 40  # margins for the labels
MAX_POINTS: Final = 300
MAX_DOTS: Final = 40

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, *, kind: str, label: str, mark_lowest: bool = False) -> str:
    """Return an ``<svg>`` of y over step whose line has the class ``kind``; empty without a finite point.

    ``thinned`` averages many points. ``label`` is not escaped: it must be our own text.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    drawn = thinned(finite)
    x_low, x_high = 0.0, max(1.0, max(x for x, _ in finite))
    x_ticks = [tick for tick in ticks(x_low, x_high) if tick <= x_high]
    y_ticks = ticks(min(y for _, y in drawn), max(y for _, y in drawn))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    decimals = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>']
    for tick in y_ticks:
        x, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{float(y) + 4:.1f}">{tick:,.{decimals}f}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text class="tick middle" x="{x}" y="{HEIGHT - BOTTOM + 18}">{number(tick)}</text>')
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 6}">step</text>')
    parts.append(f'<text class="name" x="{LEFT}" y="14">{label}</text>')
    placed = [place(x, y) for x, y in drawn]
    parts.append(f'<polyline class="curve {kind}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
    if len(drawn) <= MAX_DOTS:
        parts += [f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in placed]
    if mark_lowest:
        step, value = min(finite, key=lambda point: point[1])
        x, y = place(step, max(y_low, min(y_high, value)))
        parts.append(f'<circle class="best {kind}" cx="{x}" cy="{y}" r="4.5"/>')
        lowest = f"lowest {value:.5g} at step {number(step)}"
        parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="14">{lowest}</text>')
    return "".join([*parts, "</svg>"])


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most ``most`` points: more points become means of groups of equal size."""
    stretch = -(-len(points) // most)
    groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers that cover ``low`` to ``high``."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 4
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Format a number briefly for a label."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.6g}"
