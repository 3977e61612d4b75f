"""The paper's comparisons in miniature, on the tiny world: `python tools/reproduce_small.py --seeds 0 1 2`.

Each arm is a run of the program; what has a result (in --out, or in its run's folder) is not run again, what
was broken off goes on. Then a table: the mean of each arm over the seeds, and each comparison of the paper
with its figures there and, here, the difference over paired seeds with its 95 % interval (Student's t).
Half an hour to an hour a seed on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

import caprl_async
from caprl_async.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
import init_vlm
import small_data
import small_rater

TINY = Path(caprl_async.__file__).parent / "tiny"
_RL = ("conf=conf/demo.yaml", "steps=50", "evaluate.dense_policy=", "evaluate.interval=0")
_SFT = ("conf=conf/sft_demo.yaml", "evaluate.interval=0", "sft.validation=")
_LONGER = (*_SFT, "steps=400")
_LETTERS = "judge.model=pkg:tiny/models/judge_letters"


@dataclass(frozen=True)
class Arm:
    """One kind of run; `overrides` may name {data}, the folder of made data, and {seed}."""

    name: str
    what: str
    overrides: tuple[str, ...]
    measure: str = "accuracy"  # or loss: of answers to held-out questions, lower is better


@dataclass(frozen=True)
class Claim:
    """One comparison of the paper: in which `better` beats `worse` there, and its figures."""

    what: str
    better: str
    worse: str
    paper: str
    alike: bool = False  # the paper finds no difference worth naming


def _sample(draws: int) -> Arm:
    mode = (
        *("judge.mode=sample", f"judge.draws={draws}", "judge.temperature=0.6"),
        "evaluate.heldout_judge.mode=likelihood",
    )
    return Arm(
        f"sample-{draws}",
        f"RL, {draws} sampled answer{'s' if draws > 1 else ''} per caption",
        (*_RL, _LETTERS, *mode),
    )


def _questions(number: int) -> Arm:
    return Arm(
        f"questions-{number}",
        f"RL, {number} question{'s' if number > 1 else ''} per image",
        (*_RL, f"data.questions_per_image={number}"),
    )


def _pretrained(name: str, what: str, captions: str) -> Arm:
    stages = (
        *("pretrain.align.data={data}/sparse.parquet", "pretrain.align.steps=150", "pretrain.align.batch=32"),
        *((f"pretrain.further.data={captions}",) if captions else ()),
        *("pretrain.further.steps=400", "pretrain.further.batch=32", "pretrain.further.lr=5e-4"),
        *("pretrain.tune.data={data}/answers.parquet", "pretrain.tune.validation={data}/asked.parquet"),
        *("pretrain.tune.steps=200", "pretrain.tune.batch=32", "pretrain.tune.lr=3e-4"),
        *("pretrain.align.prompt=describe the image .", "pretrain.further.prompt=describe the image ."),
        *("policy.model={data}/init", "sft.validation_images=0", "sft.interval=1000"),
    )
    overrides = ("conf=conf/sft_demo.yaml", "job=pretrain", *small_rater.UNMEASURED, *stages)
    return Arm(f"pretrain-{name}", what, overrides, "loss")


ARMS = (
    Arm(
        "sft-sparse",
        "supervised, sparse captions, longer",
        (*_LONGER, "sft.data={data}/sparse.parquet"),
    ),
    Arm("sft-dense", "supervised, whole descriptions", (*_LONGER, "sft.data={data}/dense.parquet")),
    Arm("caprl", "RL, the judge's probabilities", _RL),
    *(_sample(draws) for draws in (1, 2, 4, 8)),
    *(_questions(number) for number in (1, 2, 3)),
    Arm(
        "larger",
        "supervised, three times the layers",
        (*_SFT, "steps=100", "policy.model={data}/larger", "sft.data={data}/sparse.parquet"),
    ),
    Arm(
        "rated",
        "RL, a rating of caption and image",
        (
            *(*_RL, "judge.mode=rate", "judge.model={data}/rater/run/model", "judge.temperature=0.2"),
            "evaluate.heldout_judge.mode=likelihood",
        ),
    ),
    Arm("unfiltered", "RL, three in ten answers wrong", (*_RL, "data.train={data}/unfiltered.parquet")),
    _pretrained("none", "pre-trained without captions", ""),
    _pretrained("sparse", "pre-trained on sparse captions", "{data}/sparse.parquet"),
    _pretrained("sft", "pre-trained on the start's captions", "{data}/by-start"),
    _pretrained("caprl", "pre-trained on the RL captioner's", "{data}/by-caprl-{seed}"),
    _pretrained("truth", "pre-trained on whole descriptions", "{data}/dense.parquet"),
)
CLAIMS = (
    Claim("RL makes a small captioner better than a larger one", "caprl", "larger", "48.3 against 44.9 (7B)"),
    Claim("RL beats its start", "caprl", "start", "Prism average 48.3 against 39.9"),
    Claim(
        "questions beat a rating", "caprl", "rated", "48.3 against 42.5 (Qwen2.5-VL), 38.4 (UnifiedReward)"
    ),
    Claim("RL beats longer supervised training", "caprl", "sft-sparse", "not published as such"),
    Claim("two draws beat one", "sample-2", "sample-1", "47.6 against 47.3"),
    Claim("four draws beat two", "sample-4", "sample-2", "48.4 against 47.6"),
    Claim("eight draws are as good as four", "sample-8", "sample-4", "48.3 against 48.4", alike=True),
    Claim("two questions beat one", "questions-2", "questions-1", "48.5 against 48.0"),
    Claim(
        "three questions are as good as two", "questions-3", "questions-2", "48.5 against 48.5", alike=True
    ),
    Claim("filtered questions beat unfiltered", "caprl", "unfiltered", "48.5 against 47.4"),
    Claim("captions help", "pretrain-caprl", "pretrain-none", "59.7 against 55.5"),
    Claim("RL's captions beat sparse ones", "pretrain-caprl", "pretrain-sparse", "59.7 against 56.7, 57.1"),
    Claim("RL's captions beat its start's", "pretrain-caprl", "pretrain-sft", "not published as such"),
)
Results = Mapping[str, Mapping[str, float]]  # by arm: a value for each seed that it was run with


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every arm has a result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[arm.name for arm in ARMS], help="these arms alone")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduce"), help="where the table goes")
    parser.add_argument("overrides", nargs="*", help="conf keys of every arm, key=value")
    args = parser.parse_args(argv)
    if args.overrides and parser.get_default("out") == args.out:
        parser.error("with conf keys of your own name --folder and --out too: the results are others")
    arms = [arm for arm in ARMS if not args.only or arm.name in args.only]
    data = args.folder / "data"
    make_data(data)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    values: dict[str, dict[str, float]] = json.loads(results.read_text()) if results.is_file() else {}
    for seed in args.seeds:
        for arm in arms:
            if str(seed) in values.get(arm.name, {}):
                continue
            for name, value in run_arm(arm, seed, args.folder, data, args.overrides).items():
                values.setdefault(name, {})[str(seed)] = value
            write_json(results, values)
    written = table(arms, values)
    (args.out / "table.md").write_text(written)
    print(written)
    return 0


def make_data(folder: Path) -> None:
    """Everything that arms share; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = TINY / "data" / "train.parquet", TINY / "data" / "heldout.parquet"
    made: dict[str, Callable[[Path], None]] = {
        "sparse.parquet": lambda path: small_data.write_captions(path, "sparse", 2000, 0),
        "dense.parquet": lambda path: small_data.write_captions(path, "dense", 2000, 0),
        "unfiltered.parquet": lambda path: small_data.write_unfiltered(train, path, 0.3, 0),
        "answers.parquet": lambda path: small_data.write_answers(train, path, 200),
        "asked.parquet": lambda path: small_data.write_answers(heldout, path, 200),
    }
    for name, make in made.items():
        if not (folder / name).is_file():
            make(folder / name)
    if not (folder / "init" / "config.json").is_file():
        model = init_vlm.combine(TINY / "models" / "judge", TINY / "models" / "policy", 0)
        init_vlm.save(model, TINY / "models" / "policy", folder / "init")


def run_arm(arm: Arm, seed: int, folder: Path, data: Path, overrides: Sequence[str]) -> dict[str, float]:
    """What the arm, and where it measured one its start, came to."""
    run_dir = folder / f"{arm.name}-{seed}"
    result = run_dir / ("3-tune/result.json" if arm.measure == "loss" else "result.json")
    if not result.is_file():
        _make_captions(arm, seed, folder, data, overrides)
        if arm.name == "larger":
            _make_larger(data / "larger")
        if arm.name == "rated":
            small_rater.make(data / "rater")
        filled = [one.replace("{data}", str(data)).replace("{seed}", str(seed)) for one in arm.overrides]
        going_on = ["resume=true"] if (run_dir / "ledger.sqlite").is_file() else []
        small_rater.program(*filled, f"seed={seed}", f"run_dir={run_dir}", *going_on, *overrides)
    found = json.loads(result.read_text())
    if arm.measure == "loss":
        return {arm.name: found["validation_loss"]}
    start = {"start": found["start"]["heldout_judge"]} if arm.name == "caprl" else {}
    return {**start, arm.name: found["trained"]["heldout_judge"]}


def _make_captions(arm: Arm, seed: int, folder: Path, data: Path, overrides: Sequence[str]) -> None:
    """The start's, or the RL captioner's, captions of the images that all pre-training sees."""
    models = {
        "pretrain-sft": (data / "by-start", TINY / "models" / "policy"),
        "pretrain-caprl": (data / f"by-caprl-{seed}", folder / f"caprl-{seed}" / "model"),
    }
    if arm.name not in models:
        return
    out, model = models[arm.name]
    if not out.is_dir() and not model.is_dir():  # its result came from elsewhere
        (trained,) = [one for one in ARMS if one.name == "caprl"]
        run_arm(trained, seed, folder, data, overrides)
    if not out.is_dir():
        run_dir = folder / f"captions-{out.name}"
        small_rater.program(
            *("conf=conf/annotate_demo.yaml", f"data.images={data / 'dense.parquet'}"),
            *(f"captioner.model={model.resolve()}", "captioner.temperature=0.0", "annotate.form=webdataset"),
            *(f"run_dir={run_dir}", f"seed={seed}", *(["resume=true"] if run_dir.is_dir() else [])),
        )
        out.symlink_to((run_dir / "captions").resolve())


def _make_larger(folder: Path) -> None:
    """A larger captioner: the start with more layers, trained further on sparse captions of fresh images."""
    if (folder / "model.safetensors").is_file():
        return
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from caprl_async.tiny.models import deeper, new_policy, save_model
    from caprl_async.tiny.pretrain import train_captions

    torch.manual_seed(0)
    start = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        TINY / "models" / "policy", dtype=torch.float32
    )
    model = deeper(start, new_policy(layers=12))

    def report(step: int, steps: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"the larger captioner: step {step} of {steps} | loss {loss:.3f}", flush=True)

    checkpoint = folder.with_suffix(".pt")
    train_captions(model, "sparse", 1000, checkpoint, report, peak=3e-4, floor=3e-5, seed=1)
    save_model(model, folder, vision=True)


# ---------------------------------------------------------------- the table


def table(arms: Sequence[Arm], values: Results) -> str:
    """Markdown: the arms, then the claims of which both sides were run, over the seeds that both have."""
    measures = {arm.name: arm.measure for arm in ARMS}
    lines = ["| run | | mean | by seed |", "|---|---|---|---|"]
    shown = [("start", "the supervised start"), *((arm.name, arm.what) for arm in arms)]
    for name, what in shown:
        if name in values:
            found = [value for _, value in sorted(values[name].items())]
            mean = sum(found) / len(found)
            each = ", ".join(_number(value, measures.get(name, "accuracy")) for value in found)
            lines.append(f"| `{name}` | {what} | {_number(mean, measures.get(name, 'accuracy'))} | {each} |")
    head = "| claim | the paper | here: difference and 95 % interval | seeds | agrees |"
    lines += ["", head, "|---|---|---|---|---|"]
    for claim in CLAIMS:
        both = sorted(values.get(claim.better, {}).keys() & values.get(claim.worse, {}).keys())
        if both:
            pairs = [(values[claim.better][seed], values[claim.worse][seed]) for seed in both]
            lines.append(_claim(claim, pairs, measures.get(claim.better, "accuracy")))
    return "\n".join(lines) + "\n"


def _claim(claim: Claim, pairs: Sequence[tuple[float, float]], measure: str) -> str:
    sign = -1.0 if measure == "loss" else 1.0
    mean, low, high = interval([sign * (better - worse) for better, worse in pairs])
    if claim.alike:
        verdict = "no difference seen" if low <= 0 <= high else "no"
    else:
        verdict = "yes" if low > 0 else "no" if high < 0 else "open"
    scale, unit, digits = (1.0, "nats", 2) if measure == "loss" else (100.0, "points", 1)
    text = f"{scale * mean:+.{digits}f} {unit}"
    if len(pairs) > 1:
        text += f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
    return f"| {claim.what} | {claim.paper} | {text} | {len(pairs)} | {verdict} |"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; of one value it is infinite."""
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return mean, -math.inf, math.inf
    error = float(stats.sem(differences))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, mean - half, mean + half


def _number(value: float, measure: str) -> str:
    return f"{value:.3f}" if measure == "loss" else f"{100 * value:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
