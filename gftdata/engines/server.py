"""Running SGLang servers, asked over HTTP. A Sampler and a Scorer, safe to use from several threads.

The native `/generate` takes and gives token ids and log-probs; what it is asked is what the offline engine is asked
(sglang_api.py), and what becomes of a failed request is decided in remote.py. All requests of a prompt go to the same
server, and within it to the same replica, where the prompt is computed once; after a failure to the next server.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from gftdata.config import ServerConfig
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
    shown,
)
from gftdata.engines.sglang_api import (
    BadAnswerError,
    failure_of,
    prompt_number,
    sampling_arguments,
    scored,
    scoring_arguments,
    to_sample,
)
from gftdata.engines.sglang_worker import reduced
from gftdata.errors import UserError
from gftdata.models import GENERIC_NAMES, model_revision
from gftdata.tokens import Tokenizer
from gftdata.types import LogProbs, Refusal, Sample, SampleRequest, Sampling, ScoreRequest, TokenIds, Unscored

POLL_S = 1.0  # between looks at a server that is not up yet
LOOK_S = 30.0  # how long a look may take: /health generates a token
KEY_ADVICE = "it wants an API key or another user, and engine server sends none: start it without --api-key"
ADVICE: Mapping[int, str] = {
    401: KEY_ADVICE,
    403: KEY_ADVICE,
    404: "no SGLang server answers there: check engine.urls",
}


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself."""

    version: str
    model_path: str
    served_name: str
    weights: tuple[Any, ...]  # what else tells one model from another
    honours_seeds: bool
    dp_size: int  # replicas behind its URL


class ServerEngine:
    """Servers that are up and serve the model. Close it, or use it as a context manager."""

    concurrent = True

    def __init__(self, model: str, config: ServerConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._urls = check_urls(config)
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_S),  # the whole attempt has its own limit
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.max_in_flight),
            follow_redirects=True,
        )
        self._remote = Remote(
            "server",
            self._urls,
            max_in_flight=config.max_in_flight,
            timeout_s=config.timeout_s,
            give_up_after_s=config.give_up_after_s,
            is_well=self._is_well,
        )
        try:
            self._servers = self._remote.run(self._meet(config.give_up_after_s))
            check_models(model, config.serves, self._servers)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        return f"sglang {' and '.join(sorted({server.version for server in self._servers.values()}))} server"

    def __enter__(self) -> "ServerEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connections. The servers go on."""
        self._remote.close(self._client.aclose)

    def sample(self, requests: Iterable[SampleRequest], sampling: Sampling) -> Iterator[Sample | Refusal]:
        """Draw one response for each request, in order of completion, `max_in_flight` at a time. See `Sampler`."""

        async def ask(request: SampleRequest, url: str) -> Sample:
            seeded = self._servers[url].honours_seeds
            arguments = sampling_arguments(self.tokenizer, sampling, request, honours_seeds=seeded)
            result = await self._json("POST", f"{url}/generate", arguments | self._replica(url, request.prompt_ids))
            with _reading():
                answer = _answer(result)
                ids, how = answer["output_ids"], answer["finish_reason"]["type"]
                if not all(type(token) is int for token in ids):
                    raise Failed("an answer whose output_ids are no ids", counts=True)
                if not 0 < len(ids) <= sampling.max_tokens:
                    raise Failed(f"{len(ids)} tokens, where 1 to {sampling.max_tokens} were asked for", counts=True)
                if how not in ("stop", "length"):
                    raise Failed(f"it ended with {quoted(str(how))}", counts=True)
                return to_sample(self.tokenizer, request, answer, honours_seeds=seeded)

        for request, answer in self._remote.stream(requests, ask, lambda r: prompt_number(r.prompt_ids)):
            yield Refusal(request, str(answer)) if isinstance(answer, UserError) else answer

    def score(self, requests: Sequence[ScoreRequest]) -> list[LogProbs | Unscored]:
        """log pi of given response tokens at temperature 1, by a prefill of prompt + response. See `Scorer`."""
        scores: list[LogProbs | Unscored] = [Unscored("not asked")] * len(requests)

        async def ask(item: tuple[int, ScoreRequest], url: str) -> LogProbs:
            _, request = item
            arguments = scoring_arguments(request) | self._replica(url, request.prompt_ids)
            result = await self._json("POST", f"{url}/generate", arguments)
            with _reading():
                return scored(self.tokenizer, request, _answer(result))

        for (i, _), answer in self._remote.stream(
            enumerate(requests), ask, lambda item: prompt_number(item[1].prompt_ids)
        ):
            scores[i] = Unscored(str(answer)) if isinstance(answer, UserError) else answer
        return scores

    async def _is_well(self) -> bool:
        """Whether a server generates, which it does here for its own request."""
        for url in self._urls:
            with suppress(Failed, Refused, UserError, TimeoutError, OSError):
                async with asyncio.timeout(LOOK_S):
                    await self._ask("GET", f"{url}/health_generate")
                    return True
        return False

    def _replica(self, url: str, prompt_ids: TokenIds) -> dict[str, int]:
        """The rank within a server must not follow from the server's own number, or some would get nothing."""
        replicas = self._servers[url].dp_size
        number = prompt_number(prompt_ids) // len(self._urls)
        return {"routed_dp_rank": number % replicas} if replicas > 1 else {}

    async def _json(self, method: str, url: str, body: Any = None) -> Any:
        response = await self._ask(method, url, body)
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise Failed(f"an answer that is no JSON: {quoted(response.text[:80])}", counts=True) from None

    async def _ask(self, method: str, url: str, body: Any = None) -> httpx2.Response:
        try:
            response = await self._client.request(method, url, json=body)
        except httpx2.HTTPError as error:
            raise of_transport(error, quoted(str(error))) from None
        if response.status_code != 200:
            raise of_status(response.status_code, response.headers, quoted(message_of(response.text)), ADVICE)
        return response

    async def _meet(self, patience_s: float) -> dict[str, Server]:
        """Wait until every server is up, and hear what it is."""
        return dict(
            zip(self._urls, await asyncio.gather(*(self._wait_for(url, patience_s) for url in self._urls)), strict=True)
        )

    async def _wait_for(self, url: str, patience_s: float) -> Server:
        looks = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            stop=stop_after_delay(patience_s),
            wait=wait_fixed(min(POLL_S, patience_s / 4)),
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            found: Server = await looks(self._look, min(LOOK_S, patience_s), url)
        except Failed as error:
            raise UserError(
                f"engine server: {shown(url)} is not up after {patience_s:g} s: {error}; start it "
                "(python -m sglang.launch_server --model-path ...), or take it out of engine.urls"
            ) from None
        except UserError as error:
            raise UserError(f"engine server: {shown(url)}: {error}") from None
        return found

    async def _look(self, seconds: float, url: str) -> Server:
        try:
            async with asyncio.timeout(seconds):
                await self._ask("GET", f"{url}/health")
                model = await self._first(url, "/model_info", "/get_model_info")
                server = await self._first(url, "/server_info", "/get_server_info")
        except TimeoutError:
            raise Failed(f"no answer within {seconds:g} s", counts=False) from None
        with _reading():
            path = str(model["model_path"])
            found = Server(
                version=str(server.get("version", "of unknown version")),
                model_path=path,
                served_name=str(model.get("served_model_name") or path),
                weights=(model.get("model_type"), model.get("architectures"), model.get("weight_version")),
                honours_seeds=bool(server.get("enable_deterministic_inference")),
                dp_size=int(server.get("dp_size") or 1),
            )
        if not model.get("is_generation", True):
            raise UserError(f"{path} is no model that generates; start the server with another")
        return found

    async def _first(self, url: str, path: str, older: str) -> dict[str, Any]:
        """What an older version gives under another name."""
        try:
            found = await self._json("GET", url + path)
        except UserError:
            found = await self._json("GET", url + older)
        if not isinstance(found, dict):
            raise Failed(f"{path} is no JSON object", counts=True)
        return found


def open_engine(model: str, config: ServerConfig, tokenizer: Tokenizer) -> ServerEngine:
    """Wait until the servers are up, at most `give_up_after_s`, and check what they serve. Raises UserError."""
    return ServerEngine(model, config, tokenizer)


def check_urls(config: ServerConfig) -> list[str]:
    """The servers' URLs. Raises UserError for what is none."""
    return [check_url(url, "engine.urls") for url in config.urls]


def check_models(model: str, serves: str | None, servers: Mapping[str, Server]) -> None:
    """Raise UserError unless every server has the config's model, and all the same one.

    A folder may stand elsewhere on the server's machine: its name is enough, unless it is one that every run has.
    Where the server's folder is here too, its weights are looked at.
    """
    for url, server in servers.items():
        known = {server.model_path, server.served_name}
        if Path(model).is_dir() and Path(server.model_path).is_dir():
            if model_revision(model) != model_revision(server.model_path):
                raise UserError(
                    f"engine server: {shown(url)} serves {server.model_path}, whose weights are not those of {model}; "
                    "restart it with the config's model"
                )
            continue
        same_name = _last(model) == _last(server.model_path) and _last(model) not in GENERIC_NAMES
        if model not in known and not same_name and serves not in known:
            named = f" (and engine.serves is {serves})" if serves else ""
            raise UserError(
                f"engine server: {shown(url)} serves {server.model_path}, and the config's model is {model}{named}; "
                f"if they are the same, set engine.serves to {server.model_path}"
            )
    first_url, first = next(iter(servers.items()))
    for url, server in servers.items():
        if server.weights != first.weights:
            raise UserError(
                f"engine server: {shown(first_url)} serves {first.model_path} {first.weights}, and {shown(url)} "
                f"{server.model_path} {server.weights}: engine.urls must all serve the same model"
            )


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _answer(result: Any) -> dict[str, Any]:
    """What is needed of an answer of `/generate`."""
    answer = reduced(result)
    if (failure := failure_of(answer)) is not None:
        raise Failed(failure, counts=True)
    return answer


@contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read as an answer is none."""
    try:
        yield
    except BadAnswerError as error:
        raise Failed(str(error), counts=True) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        found = f"{type(error).__name__}: {quoted(str(error))}"
        raise Failed(f"an answer of another shape: {found}", counts=True) from None
