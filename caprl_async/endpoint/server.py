"""The server of a model that is served elsewhere: clients for it, its key, and what its failures mean."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import msgspec
from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    OpenAI,
    OpenAIError,
)

from caprl_async.config import EndpointConfig

FAULTS = (OpenAIError, ValueError, TimeoutError)
"""What a request may end with, answers that cannot be read included."""
_OF_THE_PROMPT = (400, 413, 422)  # statuses that mean this one request; all others may pass


class EndpointError(ValueError):
    """The endpoint cannot be worked with as configured; the message names the conf key."""


class _Served(msgspec.Struct):
    id: str


class _ServedList(msgspec.Struct):
    data: list[_Served]


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, and whether it may have one later or elsewhere."""

    reason: str
    again: bool


class Server:
    """Where requests go and with which key; the key leaves this object in requests alone."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        """`key`: that of the conf which holds `config`, as judge.endpoint.

        Raises:
            EndpointError: the API key is not where `api_key_env` says.
        """
        self.url = config.url
        self.conf_key = key
        self._key = _api_key(config, key)
        self._config = config

    def client(self) -> OpenAI:
        config = self._config
        return OpenAI(
            api_key=self._key or "none",
            base_url=config.url,
            timeout=config.timeout_s,
            max_retries=config.retries,
        )

    def async_client(self) -> AsyncOpenAI:
        config = self._config
        return AsyncOpenAI(
            api_key=self._key or "none",
            base_url=config.url,
            timeout=config.timeout_s,
            max_retries=config.retries,
            # The default one, when it is collected, closes itself in whatever event loop runs then.
            http_client=DefaultAsyncHttpxClient(),
        )

    def only_model(self, client: OpenAI) -> str:
        """The one model that is served.

        Raises:
            EndpointError: there is no server, it refuses, or it serves another number of models.
        """
        try:
            content = client.models.with_raw_response.list().content
            names = [served.id for served in msgspec.json.decode(content, type=_ServedList).data]
        except FAULTS as error:
            raise self.refusal(error, f"/models (asked for where {self.conf_key}.model is empty)") from None
        if len(names) != 1:
            served = f"{len(names)} models: {', '.join(names)}" if names else "no model"
            raise EndpointError(f"{self.conf_key}.url={self.url} serves {served}; set {self.conf_key}.model")
        return names[0]

    def failure(self, error: Exception) -> Failure:
        """What the end of a request means for the question that was asked."""
        again = True
        if isinstance(error, APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            reason = f"status {error.status_code}: {body.get('message') or error.message}"
            again = error.status_code not in _OF_THE_PROMPT
        elif isinstance(error, APIConnectionError):
            cause = error.__cause__
            reason = error.message + (f" ({type(cause).__name__}: {cause})" if cause is not None else "")
        elif isinstance(error, TimeoutError):
            reason = f"no whole answer within {self.conf_key}.timeout_s"
        else:
            reason = str(error) or type(error).__name__
        return Failure(self._without_key(" ".join(reason.split()))[:300], again)

    def refusal(self, error: Exception, asked: str) -> EndpointError:
        """The error of a server that cannot be worked with: which key names it, and how to mend that."""
        status = error.status_code if isinstance(error, APIStatusError) else None
        if status in (401, 403):
            mend = f"set {self.conf_key}.api_key_env to the environment variable that holds its key"
        elif status == 404:
            mend = (
                f"the url must end where /chat/completions begins (mostly in /v1), and {self.conf_key}.model "
                "must be a name that the server knows"
            )
        elif isinstance(error, APIConnectionError | TimeoutError):
            mend = "start the server there, or correct the url"
        elif status is not None and (status >= 500 or status == 429):
            mend = "look into the server's log, or try again when it has less to do"
        else:
            mend = (
                f"correct the url, or what the server names ({self.conf_key}.prefill=false for one that "
                "knows no continue_final_message)"
            )
        reason = self.failure(error).reason
        return EndpointError(f"{self.conf_key}.url={self.url} does not answer {asked}: {reason}; {mend}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _api_key(config: EndpointConfig, conf_key: str) -> str:
    name = config.api_key_env
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]+", key):  # anything else fails as a header, in an error that shows it
        what = "holds what cannot be a key" if key else "is not set"
        raise EndpointError(f"the environment variable {name} {what} ({conf_key}.api_key_env={name})")
    return key
