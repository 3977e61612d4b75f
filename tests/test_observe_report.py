"""The report holds what the run folder holds, escapes it, and can be made of any half-finished run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.data.rows import Reject, append_rejects
from caprl_async.observe import names, table
from caprl_async.observe.charts import CHARTS, series, smooth
from caprl_async.observe.metrics import MetricsWriter
from caprl_async.observe.report import write_report
from caprl_async.observe.table import Row

EVIL = "<script>alert(1)</script> & {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, attributes and text of a page, by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + " " + " ".join(data.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _questions(trained: bool) -> dict[str, list[dict[str, Any]]]:
    def one(i: int, stem: str) -> dict[str, Any]:
        right = trained or i == 0
        return {
            "question_id": f"q{i}",
            "stem": stem,
            "answer": "red",
            "kind": "absent" if i == 2 else "fact",
            "choice": "red" if right else "blue",
            "score": 0.9 if right else 0.1,
            "outcome": "scored",
        }

    return {
        "judge": [one(i, f"what color is topleft ({i}) ?") for i in range(3)],
        "heldout": [one(i, f"the topleft thing has which color ({i}) ?") for i in range(2)],
    }


def _sample(step: int, picture: str) -> dict[str, Any]:
    shares = [c / 8 for c in range(8)]
    return {
        "step": step,
        "key": f"train/{step}",
        "row_id": f"train-{step}",
        "image": picture,
        "captions": [
            {
                "text": f"caption {c}",
                "tokens": 4,
                "reward": share,
                "accuracy": share,
                "length": 1.0,
                "versions": ["0.1", "0.2"],
            }
            for c, share in enumerate(shares)
        ],
        "questions": [
            {
                "stem": "what shape is red ?",
                "choices": ["circle", "star"],
                "answer": None,
                "kind": "absent",
                "scores": shares,
                "choice": ["circle"] * 8,
            }
        ],
    }


def make_run(folder: Path, images: int = 3, steps: int = 60) -> Path:
    """A run folder as a finished run leaves it."""
    (folder / "evals").mkdir(parents=True)
    pictures = []
    for i in range(images):
        picture = folder / f"image-{i}.png"
        Image.new("RGB", (112, 112), (200, 40 * i % 255, 60)).save(picture)
        pictures.append(str(picture))
    rng = np.random.default_rng(0)
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            done = step / steps
            writer.write(
                step,
                {
                    names.REWARD: 0.35 + 0.35 * done + rng.normal(0, 0.02),
                    names.ACCURACY: 0.35 + 0.35 * done + rng.normal(0, 0.02),
                    names.LENGTH: 7 + 10 * done + rng.normal(0, 0.4),
                    names.STALENESS: 1.2 + rng.normal(0, 0.1),
                    names.STALENESS_MAX: 2.0,
                    names.LOGPROB_GAP: abs(rng.normal(0.05, 0.01)),
                    names.LOGPROB_GAP_FRESH: abs(rng.normal(1e-5, 1e-6)),
                    **{name: float(rng.integers(0, 16)) for name in names.QUEUE.values()},
                    names.CAPTIONS_PER_S: 30 + rng.normal(0, 3),
                    names.WAIT_S: abs(rng.normal(0.8, 0.2)),
                    names.STEP_S: abs(rng.normal(3.2, 0.2)),
                    names.SYNC_S: 0.2,
                    "idle_rollout": rng.normal(0.1, 0.02),
                    "idle_judge": rng.normal(0.4, 0.05),
                    "entropy": 1.2 - 0.5 * done,
                    "loss": 0.1 * done,
                    "grad_norm": abs(rng.normal(0.7, 0.1)),
                    "clip_fraction": abs(rng.normal(0.05, 0.01)),
                    **{f"staleness_share_{age}": 1 / 3 for age in range(3)},
                    **{f"importance_{name}": 1.0 for name in ("mean", "min", "max", "bounded")},
                    **{"effective_samples": 0.9, "kl_behaviour": 0.01, "kl": 0.0},
                    "mixed_version_share": 0.3,
                    "truncated_share": 0.02,
                    "kl": float("nan"),
                    **({"eval_judge": 0.4 + 0.3 * done} if step % 20 == 0 else {}),
                },
            )
    for name, trained in (("start", False), ("trained", True)):
        lines = [
            {
                "row_id": f"heldout-{i}",
                "image": picture,
                "caption": f"topleft red circle . {'bottomleft blue square .' if trained else ''}",
                "tokens": 9 if trained else 5,
                "finish": "stop",
                "questions": _questions(trained),
                "facts": {"stated": 4 if trained else 2, "correct": 2, "total": 6},
            }
            for i, picture in enumerate(pictures)
        ]
        (folder / "evals" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [_sample(step, pictures[0]) for step in range(1, 21)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    rows = {
        "start": Row("start", 0.372, 0.35, 7.4, 0.61, 0.30),
        "forced": Row("forced", 0.41, 0.40, 17.4, 0.33, 0.41),
        "dense": Row("dense", 0.69, 0.64, 22.0, 0.60, 0.71),
        "trained": Row("trained", 0.71, 0.66, 17.4, 0.62, 0.70),
        "ceiling": Row("ceiling", 0.98, 0.97, 24.0, 1.0, 1.0),
        "blind": Row("blind", 0.25, 0.25, 0.0),
    }
    table.write_result(
        folder / "result.json", rows, seconds=512.0, steps=steps, staleness_mean=1.2, overlap=0.95
    )
    conf.dump(Config(run_dir=str(folder), steps=steps, seed=7), folder / "conf.yaml")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def _page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_header_and_result(run_dir: Path) -> None:
    page = _page(run_dir)
    assert "+33.8 points by the judge" in page.sections[""]
    for text in ("60 of 60", "8 min 32 s", "95% of the learner steps"):
        assert text in page.sections["run"]
    for row in table.TITLES.values():
        assert row in page.sections["result"]
    assert "37.2 %" in page.sections["result"]


def test_of_supervised_training_the_page_shows_what_it_has(run_dir: Path) -> None:
    kept = yaml.safe_load((run_dir / "conf.yaml").read_text())
    (run_dir / "conf.yaml").write_text(
        yaml.safe_dump(
            kept | {"job": "sft", "sft": {"data": "/data/captions.parquet"}, "data": {"heldout": ""}}
        )
    )
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert "/data/captions.parquet" in page.sections["run"]
    assert "judge" not in page.sections["run"]
    assert "reinforcement" not in text.partition('id="conf"')[0]
    assert not {"schedule", "hacking", "samples"} & page.sections.keys()
    assert {"result", "curves", "gallery"} <= page.sections.keys()


def test_every_chart_is_drawn_in_colours_of_the_theme(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("svg")) == len(CHARTS) + 1, "and the staleness of the whole run"
    for chart in CHARTS:
        assert chart.title in page.sections["curves"]
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert not re.findall(r"#(?:0a0b0|010203|040506)", svg)
        assert "var(--series-0)" in svg


def test_the_gallery_shows_both_captions_and_each_answer(run_dir: Path) -> None:
    page = _page(run_dir)
    gallery = page.sections["gallery"]
    assert "topleft red circle . bottomleft blue square ." in gallery
    assert "states 4 facts, 2 true, of 6" in gallery
    assert "3 questions by the judge of the training" in gallery
    assert "2 questions by the held-out judge" in gallery
    assert (
        gallery.count("✗ blue") == 3 * 3
    )  # two wrong for the judge, one for the held-out judge, three images
    assert "(not in the image)" in gallery
    sources = [image["src"] or "" for image in page.all("img")]
    assert len(sources) == 3 + 6
    assert all(source.startswith("data:image/") for source in sources)


def test_training_samples_keep_scores_beside_their_captions(run_dir: Path) -> None:
    samples = _page(run_dir).sections["samples"]
    for step in (1, 20):
        assert f"step {step} " in samples
    rows = re.findall(r"caption (\d) +4 +(\d\.\d{3})", samples)
    assert rows[:4] == [("7", "0.875"), ("6", "0.750"), ("1", "0.125"), ("0", "0.000")]
    assert "0.88 0.75 0.12 0.00" in " ".join(samples.split())
    assert "abstain" in samples


def test_nothing_is_fetched_and_nothing_runs(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:"))
    assert not re.findall(r"url\((?!#)", text)


def test_text_of_the_run_is_escaped_everywhere(run_dir: Path) -> None:
    for path in (run_dir / "evals").glob("*.jsonl"):
        evil = [json.loads(line) for line in path.read_text().splitlines()]
        for line in evil:
            line["caption"] = line["row_id"] = EVIL
            for questions in line["questions"].values():
                for question in questions:
                    question["stem"] = question["answer"] = question["choice"] = EVIL
            line["questions"][EVIL] = line["questions"].pop("heldout")
        path.write_text("".join(json.dumps(line) + "\n" for line in evil))
    sample = json.loads((run_dir / "samples.jsonl").read_text().splitlines()[0])
    sample["row_id"] = sample["captions"][0]["text"] = sample["questions"][0]["stem"] = EVIL
    sample["step"] = EVIL
    (run_dir / "samples.jsonl").write_text(json.dumps(sample))
    (run_dir / "conf.yaml").write_text(f"policy:\n  model: '{EVIL}'\n")
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert not Page(text).all("script")
    for section in ("gallery", "samples", "conf", "run"):
        assert EVIL in Page(text).sections[section]  # as text, and not computed


def test_bad_input_is_counted_by_kind_with_examples(run_dir: Path) -> None:
    assert "No row or question" in _page(run_dir).sections["bad-input"]
    rejects = [Reject(f"row-{i}", None, "bad_image", "truncated", "image") for i in range(70)]
    rejects += [Reject("row-x", 2, "duplicate_options", "['red', 'Red']", "reward_model")] * 2
    rejects += [Reject("d:7", None, "malformed_json")]
    append_rejects(run_dir / "rejects.jsonl", Path("d.jsonl"), rejects)
    with MetricsWriter(run_dir) as writer:
        writer.write(61, {"messages_dropped": 12.0, "messages_refused": 3.0, "evicted_bad_row": 70.0})
    shown = " ".join(_page(run_dir).sections["bad-input"].split())
    assert "bad_image 70 image row-0: truncated row-1: truncated row-2: truncated" in shown
    assert "row-3" not in shown
    assert "duplicate_options 1 reward_model row-x, question 2: ['red', 'Red']" in shown
    assert "malformed_json 1 d:7" in shown
    for text in ("not be decoded 12", "strangers to the hub 3", "image could not be read 70"):
        assert text in shown


def test_bad_input_that_is_hostile_is_shown_as_text(run_dir: Path) -> None:
    hostile = [
        EVIL,
        "\ud800",
        "\0\x1b[31m",
        "\u2028\x85",
        "x" * 10**6,
        "</td></table><img src=x onerror=y>",
        "\u202e",
    ]
    rejects = [Reject(text, i, f"{i}{text}", text, text) for i, text in enumerate(hostile)]
    append_rejects(run_dir / "rejects.jsonl", Path(EVIL), rejects)
    with (run_dir / "rejects.jsonl").open("ab") as file:
        for line in (
            b"\xff\n",
            b"[]\n",
            b'{"reason": {"a": 1}, "row_id": [], "question": "<b>"}\n',
            b'{"reason": "cut',
        ):
            file.write(line)
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    shown = page.sections["bad-input"]
    assert EVIL in shown
    assert shown.count("question") >= len(hostile)
    assert len(text) < 10**6


def test_a_text_with_unicodes_line_breaks_is_one_line(run_dir: Path) -> None:
    sample = {**_sample(1, ""), "row_id": "a\u2028b\x85c"}
    (run_dir / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "a b c" in _page(run_dir).sections["samples"]


def test_a_damaged_conf_is_shown_as_it_is(run_dir: Path) -> None:
    (run_dir / "conf.yaml").write_bytes(b"policy: [\xff\n")
    assert "policy: [" in _page(run_dir).sections["conf"]


@pytest.mark.parametrize(
    ("missing", "section", "words"),
    [
        ("result.json", "result", "stopped early"),
        ("metrics.jsonl", "curves", "no curves"),
        ("evals/start.jsonl", "gallery", "no gallery"),
        ("evals/trained.jsonl", "gallery", "not measured"),
        ("samples.jsonl", "samples", "No samples"),
        ("conf.yaml", "conf", "no conf.yaml"),
        ("image-0.png", "gallery", "image not found"),
    ],
)
def test_a_run_that_stopped_early_still_has_a_report(
    run_dir: Path, missing: str, section: str, words: str
) -> None:
    (run_dir / missing).unlink()
    assert words in _page(run_dir).sections[section]


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    assert set(_page(tmp_path).sections) >= {"result", "run", "curves", "gallery", "samples", "conf"}


def test_half_written_files_do_not_stop_the_report(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "evals/trained.jsonl", "result.json"):
        path = run_dir / name
        path.write_text(path.read_text()[:-20])
    assert len(_page(run_dir).all("svg")) == len(CHARTS) + 1


def test_curves_skip_steps_that_lack_a_value_and_keep_the_mean() -> None:
    steps, values = series([{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "a": 3.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [1, 3])
    assert smooth(np.ones(100)) == pytest.approx(np.ones(100))
    assert len(smooth(np.arange(7.0))) == 7
