"""Paints the tiny world's images: 112 px squares, flat colours, sizes, places and shades jittered."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from caprl_async.tiny.grammar import HEIGHTS, NUMBERS, QUADRANTS, SLOTS, Entity

SIZE = 112  # px: 8 x 8 patches of 14 px

Rgb = tuple[int, int, int]
Point = tuple[float, float]

RGB: dict[str, Rgb] = {
    "red": (215, 35, 35),
    "green": (35, 160, 55),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "orange": (245, 140, 25),
    "purple": (145, 40, 165),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}


def _shade(color: str, rng: random.Random) -> Rgb:
    r, g, b = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in RGB[color])
    return (r, g, b)


def outline(shape: str, x: float, y: float, radius: float) -> list[Point]:
    """Corner points (px) of a shape centred at (x, y); circles are drawn apart."""
    if shape == "square":
        r = radius * 0.88
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.9), (x - radius, y + radius * 0.9)]
    if shape == "star":
        turns = [(-math.pi / 2 + i * math.pi / 5, radius if i % 2 == 0 else radius * 0.42) for i in range(10)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in turns]
    if shape == "cross":
        t = radius * 0.34
        steps = [(-t, -radius), (t, -radius), (t, -t), (radius, -t), (radius, t), (t, t)]
        steps += [(t, radius), (-t, radius), (-t, t), (-radius, t), (-radius, -t), (-t, -t)]
        return [(x + dx, y + dy) for dx, dy in steps]
    raise ValueError(f"unknown shape {shape!r}")


def _paint(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Rgb) -> None:
    if shape == "circle":
        r = radius * 0.95
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon(outline(shape, x, y, radius), fill=fill)


def _scene(draw: ImageDraw.ImageDraw, entities: Sequence[Entity], rng: random.Random) -> None:
    for entity in entities:
        column, row = QUADRANTS.index(entity.place) % 2, QUADRANTS.index(entity.place) // 2
        x, y = (28 + 56 * half + rng.uniform(-6, 6) for half in (column, row))
        _paint(draw, str(entity.value), x, y, rng.uniform(16, 21), _shade(entity.color, rng))


def _bars(draw: ImageDraw.ImageDraw, entities: Sequence[Entity], rng: random.Random) -> None:
    base, unit = 106, 19  # px: the axis, and the height of one level
    line = (160, 160, 160)
    for level in range(1, len(HEIGHTS) + 1):
        draw.line((0, base - level * unit, SIZE, base - level * unit), fill=line)
    draw.line((0, base, SIZE, base), fill=(60, 60, 60), width=2)
    for entity in entities:
        x = 14 + 28 * SLOTS.index(entity.place) + rng.uniform(-2, 2)
        half = rng.uniform(7, 10)
        top = base - unit * (1 + HEIGHTS.index(str(entity.value))) + rng.uniform(-2, 2)
        draw.rectangle((x - half, top, x + half, base), fill=_shade(entity.color, rng))


def _arrow(draw: ImageDraw.ImageDraw, direction: str, x: float, y: float, radius: float, fill: Rgb) -> None:
    t = radius * 0.3
    right = [(radius, 0.0), (0.0, -radius), (0.0, -t), (-radius, -t), (-radius, t), (0.0, t), (0.0, radius)]
    dx, dy = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}[direction]
    draw.polygon([(x + dx * a - dy * b, y + dy * a + dx * b) for a, b in right], fill=fill)


def _sign(draw: ImageDraw.ImageDraw, entities: Sequence[Entity], rng: random.Random) -> None:
    parts = {entity.place: entity for entity in entities}
    x, y, radius = 56 + rng.uniform(-3, 3), 56 + rng.uniform(-3, 3), rng.uniform(50, 54)
    shape = str(parts["board"].value)
    if "border" in parts:
        _paint(draw, shape, x, y, radius, _shade(parts["border"].color, rng))
        radius -= 10 if shape in ("diamond", "triangle") else 7
    _paint(draw, shape, x, y, radius, _shade(parts["board"].color, rng))
    if "arrow" in parts:
        arrow = parts["arrow"]
        middle = y + rng.uniform(-2, 2)
        _arrow(draw, str(arrow.value), x, middle, rng.uniform(15, 18), _shade(arrow.color, rng))
    if "dots" in parts:
        count = 1 + NUMBERS.index(str(parts["dots"].value))
        fill, gap, r = _shade(parts["dots"].color, rng), 12, rng.uniform(3.8, 4.6)
        for i in range(count):
            cx, cy = x + gap * (i - (count - 1) / 2), y + 26
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)


_PAINTERS = {"scene": _scene, "bars": _bars, "sign": _sign}


def paint(domain: str, entities: Sequence[Entity], rng: random.Random) -> Image.Image:
    """The image of these entities; `rng` decides only jitter, never a fact."""
    grey = rng.randint(120, 140) if domain != "bars" else rng.randint(185, 205)
    image = Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))
    _PAINTERS[domain](ImageDraw.Draw(image), entities, rng)
    return image
