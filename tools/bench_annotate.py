"""Captioning a data set against plain vLLM: is job=annotate as fast, and does its memory stay bounded?

Both sides caption the same images with the same model, limits and sampling, one after the other: `plain`
gives `vllm.LLM.generate` the images in lists of 512, `annotate` runs the job. Each side runs twice, with
--warm images and with --images, from the start of its process to its end: the rate is that of the images
between, so that start and end of a process count for neither. Prints a table; the last line is one JSON
object, whose `ratio` is the job's images per second over plain vLLM's.

With --only annotate --images 100000 the job's memory is what matters: `memory_mb` holds that of all of its
processes (their own pages, and Ray's shared memory once) at the end of each fifth of the run, and at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from caprl_async.jobs.annotate import SOME_FAILED

LIST = 512  # images that plain vLLM is given at one time
TINY = "caprl_async/tiny/models/policy"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--warm", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="times that both sides run, in turn")
    parser.add_argument("--only", choices=["plain", "annotate"], help="one side; default: both")
    parser.add_argument("--folder", type=Path, help="where images are kept between runs; default: nowhere")
    parser.add_argument(
        "arguments", nargs="*", help="key=value of the conf, on top of conf/annotate_demo.yaml"
    )
    parser.add_argument("--side", choices=["plain"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.side:
        print(json.dumps(plain(args)))
        return
    with tempfile.TemporaryDirectory(prefix="bench_annotate_") as scratch:
        args.folder = args.folder or Path(scratch, "images")
        make_images(args.folder, args.images)
        found: dict[str, list[dict[str, Any]]] = {}
        for number in range(args.rounds):
            if args.only != "annotate":
                found.setdefault("plain vLLM", []).append(between(args, partial(plain_apart, args)))
            if args.only != "plain":
                job = partial(annotate, args, Path(scratch, f"run{number}"))
                found.setdefault("job=annotate", []).append(between(args, job))
    show(found, args)


def between(args: argparse.Namespace, run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """What a run with all images gave, and the rate of those beyond a run with few."""
    _, few_s = timed(run, args.warm)
    every, every_s = timed(run, args.images)
    return {**every, "images_per_s": (args.images - args.warm) / (every_s - few_s)}


def timed(run: Callable[[int], dict[str, Any]], images: int) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    found = run(images)
    return found, time.perf_counter() - began


def show(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.images} images")
    for column in ("", "images/s, each round", "memory, MB, after each fifth", "most"):
        table.add_column(column)
    for side, rounds in found.items():
        memory = rounds[-1].get("memory_mb", {})
        table.add_row(
            side,
            ", ".join(f"{one['images_per_s']:.1f}" for one in rounds),
            " ".join(f"{one:.0f}" for one in memory.get("fifths", ())),
            f"{memory['most']:.0f}" if memory else "",
        )
    Console().print(table)
    means = {side: sum(one["images_per_s"] for one in rounds) / len(rounds) for side, rounds in found.items()}
    result: dict[str, Any] = {"images": args.images, "images_per_s": means}
    if len(means) == 2:
        result["ratio"] = means["job=annotate"] / means["plain vLLM"]
    if "job=annotate" in found:
        result |= {name: found["job=annotate"][-1][name] for name in ("memory_mb", "failed", "problems")}
    print(json.dumps(result))


# ---------------------------------------------------------------- images


def make_images(folder: Path, count: int) -> None:
    """PNG files of the tiny world, 1,000 a folder; those that are there stay."""
    import random

    from caprl_async.tiny.world import image_bytes, sample_world

    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(sample_world(random.Random(f"bench {number}"))))


def files(folder: Path, count: int) -> list[Path]:
    return sorted(folder.rglob("*.png"))[:count]


# ---------------------------------------------------------------- plain vLLM


def plain_apart(args: argparse.Namespace, images: int) -> dict[str, Any]:
    """In a process of its own, as a user's script would be."""
    asked = [sys.executable, __file__, "--side", "plain", "--images", str(images)]
    done = subprocess.run(
        [*asked, "--folder", str(args.folder), *args.arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's users write: its LLM, its own images, its own chat template."""
    from caprl_async import conf
    from caprl_async.data.processor import pixel_size
    from caprl_async.engine.build import memory_arguments, set_environment

    config = conf.load(["conf=conf/annotate_demo.yaml", *args.arguments])
    captioner = config.captioner
    set_environment(captioner.engine)
    import torch

    if captioner.engine.threads:
        torch.set_num_threads(captioner.engine.threads)
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = captioner.engine
    memory = memory_arguments(engine, on_cpu=not torch.cuda.is_available())
    llm = LLM(
        model=captioner.model, dtype=engine.dtype, max_model_len=engine.max_model_len, seed=config.seed,
        max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size, enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size, limit_mm_per_prompt={"image": 1, "video": 0},
        mm_processor_kwargs={"size": pixel_size(captioner.min_pixels, captioner.max_pixels)}, **memory,
    )  # fmt: skip
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": config.data.prompt}]}
    from transformers import AutoProcessor

    prompt = AutoProcessor.from_pretrained(captioner.model).apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=False
    )
    sampling = SamplingParams(temperature=captioner.temperature, max_tokens=captioner.max_tokens)
    found = files(args.folder, args.images)
    words = 0
    for at in range(0, len(found), LIST):
        asked = [
            {"prompt": prompt, "multi_modal_data": {"image": Image.open(file).convert("RGB")}}
            for file in found[at : at + LIST]
        ]
        out = llm.generate(asked, sampling, use_tqdm=False)
        words += sum(len(one.outputs[0].text.split()) for one in out)
    return {"words": words / len(found)}


# ---------------------------------------------------------------- the job


def annotate(args: argparse.Namespace, scratch: Path, images: int) -> dict[str, Any]:
    """The job, and the memory of its processes."""
    run_dir, source = scratch / f"run-{images}", scratch / f"images-{images}"
    source.mkdir(parents=True)
    for file in files(args.folder, images):
        (source / file.name).symlink_to(file)
    asked = [
        *(sys.executable, "-m", "caprl_async.run", "conf=conf/annotate_demo.yaml"),
        *(f"run_dir={run_dir}", f"data.images={source}", *args.arguments),
    ]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as job:
        watch = Watch(job.pid)
        assert job.stderr is not None
        lines = list(job.stderr)
        watch.stop()
    if job.returncode not in (0, SOME_FAILED):
        raise SystemExit(f"{' '.join(asked)} ended with {job.returncode}:\n{''.join(lines)}")
    result = json.loads((run_dir / "result.json").read_text())
    told = {name: result[name] for name in ("failed", "problems")}
    return {**told, "memory_mb": watch.summary()}


class Watch:
    """Memory of a process and all of its descendants, sampled in a thread."""

    def __init__(self, pid: int, every_s: float = 1.0) -> None:
        self._root = psutil.Process(pid)
        self._every_s = every_s
        self._samples: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        """MB, without the seconds in which processes end."""
        running = self._samples[:-3] or self._samples
        fifths = [running[len(running) * number // 5 - 1] for number in range(1, 6)]
        return {"fifths": fifths, "most": max(self._samples, default=0.0)}

    def _sample(self) -> None:
        while not self._over.wait(self._every_s):
            self._samples.append(memory(self._root))


def memory(root: psutil.Process) -> float:
    """MB that a process and its descendants hold: private pages of each, and shared memory once."""
    total, shared = 0, 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in family:
        try:
            info = process.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += info.rss - info.shared
        shared = max(shared, info.shared)
    return (total + shared) / 2**20


if __name__ == "__main__":
    main()
