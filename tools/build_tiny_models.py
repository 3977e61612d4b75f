"""Makes the tiny world and its models from nothing, on two CPU cores.

Stages: data, policy, policy_dense, judge, heldout_judge, judge_letters, validate. Each writes its output and
is skipped where that exists; inside a stage a checkpoint is written every 250 steps, so a broken run goes on.
Give --force with --stages to make something again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caprl_async.tiny import card, curriculum, measure, models, pretrain, world
from caprl_async.tiny.judge_train import Stage, train_judge

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

STAGES = ("data", "policy", "policy_dense", "judge", "heldout_judge", "judge_letters", "validate")
CAPTION_STEPS = 5000  # of 32 fresh images each
console = Console()


class Bar:
    """A progress line for one stage, with the loss smoothed over about 25 steps."""

    def __init__(self, name: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description:32}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._name, self._loss, self._right = name, 0.0, 0.0
        self._task = self._progress.add_task(name, total=None, info="")
        self._progress.start()

    def caption(self, step: int, steps: int, loss: float) -> None:
        if not console.is_terminal and step % 50 == 0:
            console.print(f"{self._name} {step}/{steps} loss {self._loss:.3f}")
        self._loss = loss if not self._loss else 0.96 * self._loss + 0.04 * loss
        self._progress.update(self._task, completed=step, total=steps, info=f"loss {self._loss:.3f}")

    def judge(self, stage: str, step: int, steps: int, loss: float, right: float) -> None:
        if not console.is_terminal and step % 50 == 0:
            console.print(f"{self._name}: {stage} {step}/{steps} loss {loss:.3f} right {self._right:.3f}")
        self._right = right if step == 1 else 0.96 * self._right + 0.04 * right
        info = f"loss {loss:.3f} right {self._right:.3f}"
        name = f"{self._name}: {stage}"
        self._progress.update(self._task, description=name, completed=step, total=steps, info=info)

    def close(self) -> None:
        self._progress.stop()


class Builder:
    """Runs stages; `work` holds checkpoints, `data` and `out` what is committed."""

    def __init__(self, work: Path, data: Path, out: Path, seed: int) -> None:
        self.work, self.data, self.out, self.seed = work, data, out, seed

    def output(self, stage: str) -> Path:
        """The file or folder that shows a stage is done."""
        places = {"data": self.data / "train.parquet", "validate": self.out / "validity.json"}
        return places.get(stage, self.out / stage)

    def run(self, stage: str) -> None:
        {
            "data": self._data,
            "policy": lambda: self._policy("policy", "sparse"),
            "policy_dense": lambda: self._policy("policy_dense", "dense"),
            "judge": lambda: self._judge("judge", curriculum.JUDGE_WORDS, curriculum.JUDGE_SEED),
            "heldout_judge": lambda: self._judge(
                "heldout_judge", curriculum.HELDOUT_WORDS, curriculum.HELDOUT_SEED
            ),
            "judge_letters": self._judge_letters,
            "validate": self._validate,
        }[stage]()

    def _data(self) -> None:
        world.write_world(self.data, self.seed)

    def _policy(self, name: str, kind: str) -> None:
        torch.manual_seed(self.seed)
        model, bar = models.new_policy(), Bar(name)
        checkpoint = self.work / f"{name}.pt"
        pretrain.train_captions(
            model, kind, CAPTION_STEPS, checkpoint, bar.caption, peak=1e-3, floor=3e-5, seed=self.seed
        )
        bar.close()
        models.save_model(model, self.out / name, vision=True)

    def _judge(self, name: str, stages: tuple[Stage, ...], seed: int) -> None:
        torch.manual_seed(seed)
        self._train_judge(name, models.new_judge(), stages, seed)

    def _judge_letters(self) -> None:
        from transformers import Qwen2ForCausalLM

        torch.manual_seed(curriculum.JUDGE_SEED)
        start: Qwen2ForCausalLM = Qwen2ForCausalLM.from_pretrained(self.out / "judge")
        model = models.deeper(start, models.new_judge(layers=curriculum.LETTERS_LAYERS))
        self._train_judge("judge_letters", model, curriculum.JUDGE_LETTERS, curriculum.LETTERS_SEED)

    def _train_judge(self, name: str, model: Qwen2ForCausalLM, stages: tuple[Stage, ...], seed: int) -> None:
        bar = Bar(name)
        train_judge(model, stages, self.work / f"{name}.pt", bar.judge, seed=seed)
        bar.close()
        models.save_model(model, self.out / name, vision=False)

    def _validate(self) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

        result: card.Report = {"judges": {}, "policies": {}}
        splits = {
            "judge": "heldout.parquet",
            "heldout_judge": "heldout_alt.parquet",
            "judge_letters": "heldout.parquet",
        }
        for name, split in splits.items():
            if not (self.out / name).exists():
                console.print(f"{name}: not there, not measured")
                continue
            rows = measure.read_rows(self.data / split)
            judge: Qwen2ForCausalLM = Qwen2ForCausalLM.from_pretrained(self.out / name)
            for mode, letters in (("words", False), ("letters", True)):
                result["judges"][f"{name} ({mode})"] = measure.validity(judge, rows, letters)
        rows = measure.read_rows(self.data / "heldout.parquet")
        for name in ("policy", "policy_dense"):
            if not (self.out / name).exists():
                console.print(f"{name}: not there, not measured")
                continue
            policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.out / name)
            for mode, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
                result["policies"][f"{name} ({mode})"] = measure.policy_report(policy, rows, temperature)
        self.output("validate").write_text(json.dumps(result, indent=1) + "\n")
        (self.out / "README.md").write_text(card.model_card(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder for checkpoints")
    parser.add_argument(
        "--data", type=Path, default=models.MODELS.parent / "data", help="folder of the parquet files"
    )
    parser.add_argument("--out", type=Path, default=models.MODELS, help="folder of the models")
    parser.add_argument("--seed", type=int, default=0, help="of data and policies; the judges have their own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument(
        "--force", action="store_true", help="make the named stages again, from their beginning"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    builder = Builder(args.work, args.data, args.out, args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in (stage for stage in STAGES if stage in args.stages):
        done = builder.output(stage)
        if args.force:
            (args.work / f"{stage}.pt").unlink(missing_ok=True)
        elif done.exists() and stage != "validate":
            console.print(f"{stage}: there already ({done})")
            continue
        started = time.monotonic()
        builder.run(stage)
        console.print(f"{stage}: done in {time.monotonic() - started:.0f} s")
    report = builder.output("validate")
    if report.exists():
        console.print(card.tables(json.loads(report.read_text())))


if __name__ == "__main__":
    main()
