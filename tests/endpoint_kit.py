"""A chat-completions server on loopback: it has an exact distribution and fails in the ways it is told to."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judge_kit import CAPTION, question

from caprl_async.config import JudgeConfig, JudgeEndpointConfig, JudgeMode
from caprl_async.judge.judge import Judge
from caprl_async.types import Question, Verdict

Tokens = dict[str, float]
"""First tokens of an answer and their probabilities at temperature 1."""


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> text of the option lines of a user message, in the order shown."""
    return dict(re.findall(r"^([A-Z])\) (.*)$", prompt, re.MULTILINE))


def tempered(tokens: Tokens, temperature: float) -> Tokens:
    """The distribution at `temperature`."""
    weights = {token: p ** (1 / temperature) for token, p in tokens.items()}
    return {token: weight / math.fsum(weights.values()) for token, weight in weights.items()}


def said(body: dict[str, Any]) -> str:
    """The text of the user's turn."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "<image>") for part in content)


class FakeServer:
    """What it is told is in its attributes; what it was asked is in `bodies` and `keys`."""

    def __init__(self, tokens: Callable[[str], Tokens]) -> None:
        self.tokens = tokens
        self.models = ["tiny"]
        self.most_logprobs = 20  # 0: refuses to give any; -1: leaves them out
        self.faults: list[Fault] = []  # one for each of the next requests
        self.always: Fault | None = None
        self.delay_s = 0.0  # before each answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def prompts(self) -> list[str]:
        return [said(body) for body in self.bodies]

    def content(self, token: str, body: dict[str, Any]) -> str | None:
        return token if body["max_tokens"] == 1 else token + " ..."

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = self.tokens(said(body))
        drawn = tempered(tokens, body["temperature"] or 0.01)
        rng = random.Random(body.get("seed"))
        (token,) = rng.choices(list(drawn), list(drawn.values()))
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": self.content(token, body)},
        }
        if body.get("logprobs") and self.most_logprobs > 0:
            top = sorted(tokens, key=lambda one: -tokens[one])[: body["top_logprobs"]]
            listed = [{"token": one, "logprob": math.log(tokens[one])} for one in top]
            choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
        usage = {
            "prompt_tokens": 10,
            "completion_tokens": 1,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        choices = [choice | {"index": index} for index in range(body.get("n", 1))]
        return {"id": "x", "object": "chat.completion", "choices": choices, "usage": usage}


class _ManyAtOnce(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.keys.append(self.headers["Authorization"])
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": name} for name in self.fake.models]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
            fake.bodies.append(body)
            fake.keys.append(self.headers["Authorization"])
            fake.times.append(time.monotonic())
            fault = fake.faults.pop(0) if fake.faults else fake.always
        time.sleep(fake.delay_s)
        try:
            if self.path != "/v1/chat/completions" or body["model"] not in fake.models:
                self.reply(404, {"error": {"message": f"no {self.path} of {body['model']}"}})
            elif fault is not None:
                fault(self)
            elif body.get("logprobs") and 0 <= fake.most_logprobs < body["top_logprobs"]:
                self.reply(400, {"error": {"message": f"top_logprobs above {fake.most_logprobs}"}})
            else:
                self.reply(200, fake.completion(body))
        finally:
            with fake.lock:
                fake.at_once -= 1

    def reply(self, status: int, content: Any, **headers: str) -> None:
        self.raw(status, json.dumps(content).encode(), **headers)

    def raw(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in {"content_length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


Fault = Callable[[_Handler], None]


def says(status: int, message: str = "something", **headers: str) -> Fault:
    return lambda handler: handler.reply(status, {"error": {"message": message}}, **headers)


def gives(content: bytes | dict[str, Any]) -> Fault:
    """Status 200 with this body."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler: handler.raw(200, raw)


def cut_off(handler: _Handler) -> None:
    """Closes the connection in the middle of the body."""
    handler.raw(200, b'{"choices": [', content_length="1000")
    handler.close_connection = True


def hang(handler: _Handler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def drip(handler: _Handler) -> None:
    """A byte now and then, as some servers send to keep a connection alive, and never an answer."""
    handler.raw(200, b"", content_length="1000")
    for _ in range(15):
        time.sleep(0.1)
        try:
            handler.wfile.write(b"\n")
        except OSError:
            break
    handler.close_connection = True


@contextmanager
def serving(tokens: Callable[[str], Tokens]) -> Iterator[FakeServer]:
    fake = FakeServer(tokens)
    server = _ManyAtOnce(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SURE = {"red": 0.5, "blue": 0.2, "Can not answer based on the caption": 0.1}
QUESTIONS = (
    question(["red", "blue"], 0, "color"),
    question(["blue", "red"], 0, "other"),
    question(["blue", "red"], None, "absent"),
)


def by_text(prompt: str) -> Tokens:
    """Knows what it prefers wherever that stands, and says letters in several ways, and other things."""
    tokens = {"According": 0.15, "b": 0.05}
    for letter, text in options_of(prompt).items():
        p = 0.5 if text == "circle" else SURE.get(text, 0.01)  # the trial's right option
        tokens |= {f" {letter}": 0.7 * p, letter: 0.2 * p, f"{letter})": 0.1 * p}
    return {token: p / math.fsum(tokens.values()) for token, p in tokens.items()}


def by_place(prompt: str) -> Tokens:
    """Prefers letters, whatever they stand for."""
    return {"A": 0.6, "B": 0.3, "C": 0.1}


def config_for(server: FakeServer, mode: JudgeMode = JudgeMode.expected, **values: Any) -> JudgeConfig:
    endpoint = {"timeout_s": 5.0, "retries": 0} | values.pop("endpoint", {})
    return JudgeConfig(mode=mode, endpoint=JudgeEndpointConfig(url=server.url, **endpoint), **values)


def ask(
    judge: Judge,
    questions: Sequence[Question] = QUESTIONS,
    captions: Sequence[str] = (CAPTION,),
    rotation: int = 0,
) -> tuple[tuple[Verdict, ...], ...]:
    return asyncio.run(judge.judge(captions, questions, rotation))
