"""SGLang driven directly, with the same requests as `gft generate`: what `throughput.py` compares with.

    python bare_engine.py OPTIONS_JSON REQUESTS_FILE MAX_IN_FLIGHT      (by the Python that has SGLang)

Every request is sampled, then scored at temperature 1. `MAX_IN_FLIGHT` are sampled at a time, the next one starts as
one ends; beside them as many are scored, which is how our engine does it too.
Prints {"seconds": ..., "tokens": output tokens} without the engine's start.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import sglang


async def drive(engine: Any, requests: list[dict[str, Any]], max_in_flight: int) -> int:
    waiting = iter(requests)
    tokens = 0
    slots = asyncio.Semaphore(max_in_flight)
    scoring: list[asyncio.Task[None]] = []

    async def score(prompt: list[int], response: list[int]) -> None:
        async with slots:
            await engine.async_generate(
                input_ids=[*prompt, *response],
                sampling_params={"max_new_tokens": 0, "temperature": 1.0},
                return_logprob=True,
                logprob_start_len=len(prompt) - 1,
            )

    async def sample() -> None:
        nonlocal tokens
        for request in waiting:
            sampled = await engine.async_generate(**request)
            tokens += len(sampled["output_ids"])
            scoring.append(asyncio.create_task(score(request["input_ids"], sampled["output_ids"])))

    await asyncio.gather(*(sample() for _ in range(max_in_flight)))
    await asyncio.gather(*scoring)
    return tokens


def main() -> None:
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    requests = json.loads(Path(sys.argv[2]).read_text())

    async def timed() -> None:
        began = time.perf_counter()
        tokens = await drive(engine, requests, int(sys.argv[3]))
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)

    asyncio.run(timed())
    os._exit(0)  # the engine's own shutdown may hang


if __name__ == "__main__":
    main()
