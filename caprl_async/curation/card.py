"""The data card: what was asked, what was kept and why the rest was not, in numbers, plots and examples."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from caprl_async.curation.checks import Accuracy
from caprl_async.files import write_json
from caprl_async.observe.pages import data_uri, template, write_page
from caprl_async.types import Question

_TEMPLATE = Path(__file__).with_name("card.html")
_MEASURES = {
    "with_image": "answered right with the image",
    "without_image": "answered right without it",
    "with_caption": "answered right from the row's caption",
}


@dataclass(frozen=True)
class Example:
    """One kept image."""

    image: str  # path
    questions: Sequence[Question]


@dataclass
class Card:
    """What a card tells."""

    about: Mapping[str, Any]
    images: int = 0  # that came
    questions: int = 0  # that could be asked
    images_kept: int = 0
    questions_kept: int = 0
    images_left_out: Counter[str] = field(default_factory=Counter)  # by reason
    questions_left_out: Counter[str] = field(default_factory=Counter)
    accuracies: list[Accuracy] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def write_card(card: Card, folder: Path) -> None:
    """Writes `card.json` and `card.html` into the folder."""
    told = {name: value for name, value in vars(card).items() if name not in ("accuracies", "examples")}
    write_json(folder / "card.json", told)
    page = template(_TEMPLATE).render(
        card=card,
        plots=[(title, Markup(_histogram(values))) for title, values in _measured(card.accuracies)],
        images=[data_uri(Path(example.image)) for example in card.examples],
    )
    write_page(folder / "card.html", page)


def _measured(accuracies: Sequence[Accuracy]) -> list[tuple[str, list[float]]]:
    found = []
    for name, title in _MEASURES.items():
        values = [value for one in accuracies if (value := getattr(one, name)) is not None]
        if values:
            found.append((title, values))
    return found


def _histogram(values: Sequence[float]) -> str:
    figure = Figure(figsize=(4.2, 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(values, bins=[i / 10 for i in range(11)], color="#1f5fbf")
    axes.set_xlabel("share of its answers that were right")
    axes.set_ylabel("questions")
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
