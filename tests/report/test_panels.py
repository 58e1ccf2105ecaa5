"""The size of the report's figures: room for the axes whatever the number and the length of the models' names."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import pytest
from PIL import Image

from salsa_peft.report import plots, style
from salsa_peft.report.replicates import curves
from salsa_peft.report.sections import frontier
from salsa_peft.report.style import Panel

SCORE = {"mean": 0.5, "low": 0.4, "high": 0.6}


def panels(names: list[str]) -> list[Panel]:
    """A figure of each kind that has a row or an entry of the legend for every model."""
    looks = style.looks(names)
    rows = [{"episode": at, "objective/kl": 1.0 + at} for at in range(3)]
    band = {key: [0.0, 1.0] for key in ("episode", "mean", "low", "high")}
    spots = [
        {"policy": name, "path": [[0.0, 0.0], [1.0, 1.0]], "ends": [[1.0, 1.0]], "kl": SCORE, "score": SCORE, "control": False}
        for name in names
    ]  # fmt: skip
    points = [{"name": name, "x": 0.1, "adjusted_win_rate": 0.6, "low": 0.5, "high": 0.7} for name in names]
    return [
        plots.curve("training-kl", "KL", dict.fromkeys(names, rows), "objective/kl", looks),
        plots.ablation("ablation-0", "Over ppo", points, "β", False, looks),
        curves._draw("training-kl", "KL", dict.fromkeys(names, band), looks),
        frontier.draw({"measure": "gold", "on": "training", "policies": spots}, looks),
        plots.scores("scores-in", "Gold reward", dict.fromkeys(names, SCORE), "gold", looks),
    ]


@pytest.mark.parametrize(("count", "length"), [(2, 4), (32, 8), (8, 60)])
def test_the_axes_keep_their_size(count: int, length: int) -> None:
    """Without matplotlib's warning of axes that collapsed; the width of a panel is that of its section where names are short."""
    names = [f"{number:02d}{'x' * (length - 2)}" for number in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = panels(names)
    for one in drawn:
        width, height = (side / 150 for side in Image.open(io.BytesIO(one.png)).size)
        assert height > 1.4 and _axes_height(one) > 0.4 * 72
        assert length > 8 or width == pytest.approx(frontier.WIDTH if one.name.startswith("frontier") else style.WIDTH)
    assert all(_axes_height(one) > 1.9 * 72 for one in drawn[:3]), (
        "a long legend is below the axes, not over the curves"
    )
    if count == 2:
        assert Image.open(io.BytesIO(drawn[0].png)).height == pytest.approx(2.8 * 150, abs=1)


def _axes_height(one: Panel) -> float:
    """Height in points of the panel's axes: of the first clip path, which is their rectangle."""
    found: Any = re.search(r'<clipPath[^>]*>\s*<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', one.svg)
    return float(found[1])
