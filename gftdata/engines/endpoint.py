"""Any OpenAI-compatible endpoint, as a teacher. A Sampler only: it takes and gives text, without ids and log-probs.

Through the `openai` client, without its own retries: what becomes of a failed request is decided in remote.py. The key
comes from an environment variable, and is cut out of whatever the endpoint says before that is quoted.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import openai

from gftdata.config import OpenaiConfig
from gftdata.engines.remote import (
    CONNECT_S,
    Failed,
    Refused,
    Remote,
    check_url,
    message_of,
    of_status,
    of_transport,
    quoted,
)
from gftdata.errors import UserError
from gftdata.types import FinishReason, Refusal, Sample, SampleRequest, Sampling

LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"  # newer models refuse the first
OURS = {"model", "messages", "temperature", "top_p", "seed", "stop", "n", "stream", LIMIT, NEWER_LIMIT}
MAY_BE_LEFT_OUT = {"temperature", "top_p", "seed"}  # by `null` in `extra`, for endpoints that refuse them


class Endpoint:
    """A connection to an endpoint. Close it, or use it as a context manager."""

    def __init__(self, model: str, config: OpenaiConfig) -> None:
        key = _key(config)
        self._model = model
        self._extra = config.extra
        self._limit = LIMIT
        self._quoted: Callable[[str], str] = lambda text: quoted(without(key, text))
        self._advice: Mapping[int, str] = {
            401: f"check the key in {config.api_key_env} (engine.api_key_env)",
            403: f"the key in {config.api_key_env} (engine.api_key_env) does not allow this: check it, and the model",
            404: f"check engine.base_url (it usually ends in /v1) and the model's name, {model}",
        }
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=config.base_url,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=httpx2.Timeout(None, connect=CONNECT_S),  # the whole attempt has its own limit
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.max_in_flight),
            ),
        )
        self._remote = Remote(
            "openai",
            [str(self._client.base_url).rstrip("/")],
            max_in_flight=config.max_in_flight,
            timeout_s=config.timeout_s,
            give_up_after_s=config.give_up_after_s,
        )

    @property
    def version(self) -> str:
        return f"openai {openai.__version__} client"

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connections."""
        self._remote.close(self._client.close)

    def sample(self, requests: Iterable[SampleRequest], sampling: Sampling) -> Iterator[Sample | Refusal]:
        """Draw one response for each request, in order of completion, `max_in_flight` at a time. See `Sampler`."""

        async def ask(request: SampleRequest, _: str) -> Sample:
            return self._to_sample(request, await self._chat(request, sampling))

        for request, answer in self._remote.stream(requests, ask):
            yield Refusal(request, str(answer)) if isinstance(answer, UserError) else answer

    async def _chat(self, request: SampleRequest, sampling: Sampling) -> Any:
        """One chat completion: the JSON of an answer with status 200."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(request.seed) % 2**31,  # more bits than that are refused by some
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        body |= self._extra
        body = {name: value for name, value in body.items() if value is not None or name not in MAY_BE_LEFT_OUT}
        while True:
            limit = self._limit
            try:
                response = await self._client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=body | {limit: sampling.max_tokens}
                )
                break
            except openai.APIStatusError as error:
                if limit == LIMIT and _limit_is_refused(error):
                    self._limit = NEWER_LIMIT
                    continue
                said = self._quoted(message_of(error.response.text))
                raise of_status(error.status_code, error.response.headers, said, self._advice) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                raise of_transport(cause, self._quoted(str(cause))) from None
            except openai.OpenAIError as error:
                raise UserError(f"{type(error).__name__}: {self._quoted(str(error))}") from None
        if response.status_code != 200:
            raise Failed(f"answered {response.status_code}", counts=True)
        try:
            return response.json()
        except (ValueError, RecursionError):
            start = self._quoted(response.text)[:80]
            raise Failed(f"an answer that is no JSON: {start}", counts=True) from None

    def _to_sample(self, request: SampleRequest, answer: Any) -> Sample:
        try:
            choice = answer["choices"][0]
            reason, content = choice["finish_reason"], choice["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            said = self._quoted(message_of(json.dumps(answer)))
            raise Failed(f"an answer of another shape ({type(error).__name__}): {said}", counts=True) from None
        if reason == "content_filter":
            raise Refused("the endpoint's content filter stopped it")
        if reason not in ("stop", "length"):
            raise Failed(f"it ended with {self._quoted(str(reason))}", counts=True)
        if not isinstance(content, str | None):
            raise Failed("an answer whose content is no text", counts=True)
        usage = answer.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        ended: FinishReason = "length" if reason == "length" else "stop"
        return Sample(
            request,
            content or "",
            response_ids=np.zeros(0, np.int32),
            behavior_logprobs=np.zeros(0, np.float32),
            num_tokens=count if type(count) is int and count > 0 else 0,
            finish_reason=ended,
            seed=None,  # endpoints only try to honour it
        )


def open_endpoint(model: str, config: OpenaiConfig) -> Endpoint:
    """Raises UserError where the settings or the key cannot be right; nothing is asked yet."""
    check_key(config)
    return Endpoint(model, config)


def check_key(config: OpenaiConfig) -> None:
    """Raise UserError where the key is missing, or a setting cannot be right."""
    _key(config)
    if config.base_url is not None:
        check_url(config.base_url, "engine.base_url")
    for name in sorted(OURS & config.extra.keys()):
        if name not in MAY_BE_LEFT_OUT:
            raise UserError(f"engine.extra: {name} follows from other settings and cannot be set there")
        if config.extra[name] is not None:
            raise UserError(f"engine.extra: {name} has a setting of its own; here it can only be null, to be left out")


def without(key: str, text: str) -> str:
    """A text with the key cut out, also where it stands as in a URL or in JSON."""
    for form in (key, quote(key, safe=""), json.dumps(key)[1:-1]):
        text = text.replace(form, "***")
    return text


def _key(config: OpenaiConfig) -> str:
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.api_key_env} (engine.api_key_env) is not set: set it to the endpoint's "
            "key, or to any text where the endpoint wants none"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"the environment variable {config.api_key_env} (engine.api_key_env) holds characters that no key has: "
            "set it to the endpoint's key alone"
        )
    return key


def _limit_is_refused(error: openai.APIStatusError) -> bool:
    """Whether it is the name of the limit that the endpoint does not take."""
    said = message_of(error.response.text)
    if error.status_code not in (400, 422) or (error.param != LIMIT and LIMIT not in said):
        return False
    return NEWER_LIMIT in said or error.code == "unsupported_parameter" or "unsupported" in said.lower()
