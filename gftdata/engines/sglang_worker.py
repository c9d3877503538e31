"""The child process that holds a SGLang engine. Run as a script, also by the Python of another environment.

Imports nothing but the standard library and sglang, so that the environment which has SGLang needs nothing of ours.
The engine's death kills its whole process tree, this process included: that is why it is not in ours.

    python sglang_worker.py FD ENGINE_OPTIONS_JSON

Reads one JSON request a line from standard input, {"id": ..., "arguments": {...}} for `Engine.async_generate`, and
writes to file descriptor FD one `message` for each as it is done, {"id": ..., "answer": {...}} with its numbers, as
`packed` makes them, or {"id": ..., "error": ...}, in order of completion. The first one is {"ready": version}. Ends
when standard input does.
"""

import asyncio
import json
import math
import os
import sys
import threading
from array import array
from typing import Any

LOGPROBS = ("input_token_logprobs", "output_token_logprobs")


def main() -> None:
    descriptor, options = int(sys.argv[1]), json.loads(sys.argv[2])
    answers = os.fdopen(descriptor, "wb")
    os.set_inheritable(descriptor, False)  # the engine's own processes must not hold the pipe open when this one dies
    sys.path.pop(0)  # this folder, in which `sglang` is our own module
    import sglang  # type: ignore[import-not-found,unused-ignore]

    engine = sglang.Engine(**options)

    def write(data: bytes) -> None:
        answers.write(data)
        answers.flush()

    write(message({"ready": sglang.__version__}))
    asyncio.run(serve(engine, write))
    os._exit(0)  # the engine's processes follow their parent; its own shutdown may hang


async def serve(engine: Any, write: Any) -> None:
    """One event loop for the engine's life; a request is a task of its own, so that one that fails fails alone."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    async def handle(request: dict[str, Any]) -> None:
        try:
            result = await engine.async_generate(**request["arguments"])
        except Exception as error:
            write(message({"id": request["id"], "error": f"{type(error).__name__}: {error}"}))
            return
        answer, numbers = packed(reduced(result))
        write(message({"id": request["id"], "answer": answer}, numbers))

    def start(request: dict[str, Any]) -> None:
        task = loop.create_task(handle(request))
        running.add(task)
        task.add_done_callback(running.discard)

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(start, json.loads(line))
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read, daemon=True).start()
    await ended.wait()


def reduced(result: dict[str, Any]) -> dict[str, Any]:
    """What is needed of a result: how it ended, ids, and [log-probs, ids] of each kind that it has."""
    meta = result["meta_info"]
    answer: dict[str, Any] = {"finish_reason": meta["finish_reason"], "output_ids": result.get("output_ids")}
    for name in LOGPROBS:
        if meta.get(name) is not None:
            answer[name] = [[entry[0] for entry in meta[name]], [entry[1] for entry in meta[name]]]
    return answer


def packed(answer: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A reduced answer with lengths in the place of arrays, and the arrays: a tenth of the work of reading JSON.

    Ids are int32 and log-probs float32, NaN for None, in the machine's own order of bytes.
    """
    small = {"finish_reason": answer["finish_reason"]}
    arrays: list[array[Any]] = []
    if answer.get("output_ids") is not None:
        small["output_ids"] = len(answer["output_ids"])
        arrays.append(array("i", answer["output_ids"]))
    for name in LOGPROBS:
        if name in answer:
            logprobs, ids = answer[name]
            small[name] = len(ids)
            arrays.append(array("f", [math.nan if logprob is None else logprob for logprob in logprobs]))
            arrays.append(array("i", ids))
    return small, b"".join(arrays)


def message(content: dict[str, Any], numbers: bytes = b"") -> bytes:
    """A line of JSON, and after it as many bytes as it says."""
    return json.dumps(content | {"bytes": len(numbers)}).encode() + b"\n" + numbers


if __name__ == "__main__":
    main()
