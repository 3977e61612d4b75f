"""The learner actor as the supervisor and the weights room use it: steps, snapshots, checkpoints, exports."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from learner_kit import POLICY, images, make_batch, tiny_config, tiny_processor
from safetensors.torch import load_file

from caprl_async.config import LoRAConfig
from caprl_async.learner.prefix import ATTENTION
from caprl_async.types import FOREIGN, TrainBatch, Version

pytestmark = pytest.mark.slow


class Hub:
    """Answers every rank with the batch of its version."""

    def __init__(self, batches: list[TrainBatch]) -> None:
        self.batches = {batch.version: batch for batch in batches}

    def request_batch(self, version: Version, **_: Any) -> TrainBatch | None:
        return self.batches.get(version)

    def close(self) -> None:
        pass


def started(rank: int, world: int, port: int | None, folder: Path, **learner: Any) -> tuple[Any, Hub]:
    """An actor whose hub is `Hub`; no message leaves this process."""
    from caprl_async.learner.actor import LearnerActor
    from caprl_async.replay import peer

    pixels = folder / f"images-{rank}"
    pixels.mkdir(exist_ok=True)
    processor, refs = tiny_processor(), images(pixels, 3)
    hub = Hub([make_batch(processor, refs, 3, seed=s, version=Version(0, s)) for s in range(3)])
    peer.LearnerPeer = lambda address, hello: hub  # type: ignore[assignment,misc]
    config = tiny_config(**learner)
    config.run_dir = str(folder / "run")
    actor = LearnerActor(rank, config, None)  # type: ignore[arg-type]
    host, bound = actor.rendezvous() if port is None else ("127.0.0.1", port)
    assert host == "127.0.0.1"
    actor.setup(world, host, bound)
    return actor, hub


def one_rank(_: int, folder: str) -> None:
    from caprl_async.learner.actor import NoSnapshot
    from caprl_async.learner.batch import BadBatch, NotFinite
    from caprl_async.learner.snapshot import ForeignModelDiffers

    root = Path(folder)
    # No compiler may be needed.
    os.environ["CC"] = os.environ["CXX"] = "/bin/false"
    actor, hub = started(0, 1, None, root)
    assert repr(actor) == "learner-0"
    assert actor.health()["started"]

    version, start = actor.snapshot()
    on_disk = load_file(POLICY / "model.safetensors")
    assert version == Version(0, 0)
    assert start.keys() == on_disk.keys()
    assert all(torch.equal(start[name], on_disk[name]) for name in on_disk)

    report = actor.train_step(Version(0, 0))
    assert report.version == Version(0, 1)
    assert not report.done
    assert report.finished > report.started
    assert report.metrics["groups"] == 3
    after_version, after = actor.snapshot()
    assert after_version == Version(0, 1)
    assert any(not torch.equal(after[name], start[name]) for name in start)
    assert all(torch.equal(start[name], on_disk[name]) for name in on_disk), "old snapshots never change"

    actor.load_foreign(str(POLICY))
    assert actor.snapshot()[0] == FOREIGN
    assert all(torch.equal(actor.snapshot()[1][name], on_disk[name]) for name in on_disk)
    actor.restore_snapshot()
    assert actor.snapshot()[1] is after
    other = other_shape(root)
    with pytest.raises(ForeignModelDiffers, match="architecture"):
        actor.load_foreign(other)

    cut = root / "cut"
    cut.mkdir()
    actor.save(str(cut))
    actor.save(str(cut))  # over itself
    actor.saved()
    assert sorted(p.name for p in cut.iterdir()) == ["hf", "trainer"]
    exported_like_transformers(actor, cut / "hf", root)

    straight = actor.train_step(Version(0, 1))
    wanted = dict(actor.snapshot()[1])
    actor.load(str(cut), Version(1, 1))
    assert actor.snapshot()[0] == Version(1, 1)
    assert all(torch.equal(actor.snapshot()[1][name], after[name]) for name in after)
    hub.batches[Version(1, 1)] = moved(hub.batches[Version(0, 1)], Version(1, 1))
    again = actor.train_step(Version(1, 1))
    assert all(torch.equal(actor.snapshot()[1][name], wanted[name]) for name in wanted), (
        "optimizer state restored"
    )
    assert again.metrics["loss"] == straight.metrics["loss"]

    hub.batches[Version(1, 2)] = banned_token(hub.batches[Version(0, 2)], Version(1, 2))
    with pytest.raises(BadBatch, match=r"train/1@0\[2\].*banned"):
        actor.train_step(Version(1, 2))
    hub.batches[Version(1, 3)] = moved(hub.batches[Version(0, 2)], Version(1, 3))
    named = dict(actor._trainer.hf.named_parameters())
    named["model.language_model.norm.weight"].data[3] = torch.nan
    before = {name: p.clone() for name, p in named.items()}
    with pytest.raises(NotFinite, match=r"train/\d@0\[\d\].*not_finite") as stopped:
        actor.train_step(Version(1, 3))
    kept = json.loads((Path(actor.config.run_dir) / "not_finite" / "1.3-rank-0.json").read_text())
    assert {caption["name"] for caption in kept["captions"]} == set(stopped.value.captions) != set()
    assert all(caption["caption"]["token_ids"] for caption in kept["captions"])
    assert str(pickle.loads(pickle.dumps(stopped.value))) == str(stopped.value)  # as Ray brings it back
    assert all(torch.equal(p, before[name]) for name, p in named.items() if "language_model.norm" not in name)

    done = actor.train_step(Version(1, 9))
    assert done.done
    assert done.version == Version(1, 9)
    with pytest.raises(NoSnapshot, match="holds"):
        actor.send_weights(version=Version(0, 77))
    actor.stop()
    actor.stop()


def other_shape(root: Path) -> str:
    from caprl_async.tiny.models import new_policy, save_model

    save_model(new_policy(width=64, layers=1), root / "small", vision=True)
    return str(root / "small")


def exported_like_transformers(actor: Any, hf: Path, root: Path) -> None:
    """The export holds the tensors that `save_pretrained` writes, and loads as model and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(hf)
    for name, parameter in actor._trainer.hf.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)
    AutoProcessor.from_pretrained(hf)
    assert ATTENTION not in (hf / "config.json").read_text()
    model.save_pretrained(root / "plain")
    ours, theirs = load_file(hf / "model.safetensors"), load_file(root / "plain" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def moved(batch: TrainBatch, version: Version) -> TrainBatch:
    """The same batch with all versions in another epoch."""
    import msgspec

    return msgspec.structs.replace(batch, version=version)


def banned_token(batch: TrainBatch, version: Version) -> TrainBatch:
    """One caption of one group holds a token that the engine can never sample."""
    import msgspec

    replace = msgspec.structs.replace
    scored = batch.groups[1]
    captions = list(scored.group.captions)
    image_token = tiny_processor().image_token_id
    captions[2] = replace(captions[2], token_ids=(image_token, *captions[2].token_ids[1:]))
    scored = replace(scored, group=replace(scored.group, captions=tuple(captions)))
    return replace(batch, version=version, groups=(batch.groups[0], scored, *batch.groups[2:]))


def test_one_rank_trains_snapshots_saves_and_resumes(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=1)


TWO_RANKS: dict[str, dict[str, Any]] = {
    "zero1-offload": {"zero_stage": 1, "offload_optimizer": True},
    "zero3": {"zero_stage": 3},
    "zero3-lora": {"zero_stage": 3, "lora": LoRAConfig(rank=4, targets=["self_attn.q_proj", "up_proj"])},
}


def two_ranks(rank: int, port: int, folder: str, learner: dict[str, Any]) -> None:
    from caprl_async.learner.actor import NoSnapshot, RanksDisagree

    root = Path(folder)
    actor, hub = started(rank, 2, port, root, micro_batch_tokens=300, **learner)
    actor.train_step(Version(0, 0))
    (root / "cut").mkdir(exist_ok=True)
    actor.save(str(root / "cut"))
    actor.saved()
    if rank == 0:
        after = dict(actor.snapshot()[1])
        assert all(tensor.numel() for tensor in after.values())
    else:
        with pytest.raises(NoSnapshot):
            actor.snapshot()
    actor.train_step(Version(0, 1))
    if rank == 0:
        wanted = dict(actor.snapshot()[1])
    actor.load(str(root / "cut"), Version(1, 1))
    if rank == 0:
        assert all(torch.equal(actor.snapshot()[1][name], after[name]) for name in after)
    hub.batches[Version(1, 1)] = moved(hub.batches[Version(0, 1)], Version(1, 1))
    actor.train_step(Version(1, 1))
    if rank == 0:
        assert all(torch.equal(actor.snapshot()[1][name], wanted[name]) for name in wanted)
    if rank == 1:
        hub.batches[Version(1, 2)] = moved(hub.batches[Version(0, 2)], Version(1, 2))
    with pytest.raises(RanksDisagree, match="no batch" if rank == 0 else "train/0@0"):
        actor.train_step(Version(1, 2))
    # The store lives in rank 0, which must not leave before the other has finished.
    (root / f"done-{rank}").touch()
    while len(list(root.glob("done-*"))) < 2:
        time.sleep(0.05)
    actor.stop()


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_share_snapshots_and_checkpoints(tmp_path: Path, case: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    mp.spawn(two_ranks, (port, str(tmp_path), TWO_RANKS[case]), nprocs=2)
    hf, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "cut" / "hf", POLICY))
    assert hf.keys() == start.keys()
    if "lora" in TWO_RANKS[case]:
        changed = {name for name in hf if not torch.equal(hf[name], start[name])}
        targets = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
        assert changed == {name for name in hf if name.startswith("model.") and name.endswith(targets)}
        adapter_makes(tmp_path / "cut" / "adapter", tmp_path / "cut" / "hf")


def adapter_makes(adapter: Path, hf: Path) -> None:
    """On the start policy, merged by peft."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    start = AutoModelForImageTextToText.from_pretrained(POLICY, dtype=torch.float32)
    merged = PeftModel.from_pretrained(start, adapter).merge_and_unload()
    expected = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    for (name, ours), (same, theirs) in zip(
        expected.named_parameters(), merged.named_parameters(), strict=True
    ):
        assert name == same
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=name)
