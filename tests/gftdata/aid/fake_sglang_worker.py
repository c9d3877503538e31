"""Speaks the protocol of sglang_worker.py and fails on demand: for the supervisor's tests.

A response is the prompt's last id, counted up, then the end token 1. A prompt that holds a marked id makes the process
die, hang up half way through an answer or before its last byte, abort, or answer NaN; options: {"die": [ids],
"die_once": [ids], "dying": [ids], "torn": [ids], "short": [ids], "abort": [ids], "nan": [ids], "error": [ids],
"unscorable": [ids], "slow": seconds, "no_start": bool, "log": path}.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gftdata.engines.sglang_worker import message, packed


def reason_of(kind: str) -> dict[str, object]:
    return {"type": kind}


def die(mark: str) -> None:
    Path(mark).touch()
    os._exit(1)


def main() -> None:
    options = json.loads(sys.argv[2])
    if options.get("no_start"):
        raise SystemExit("ValueError: this model cannot be loaded")
    answers = os.fdopen(int(sys.argv[1]), "wb")

    def write(data: bytes) -> None:
        answers.write(data)
        answers.flush()

    dying = False
    write(message({"ready": "fake"}))
    for line in sys.stdin:
        request = json.loads(line)
        ids = request["arguments"]["input_ids"]
        with Path(options["log"]).open("a") as log:
            log.write(json.dumps(ids) + "\n")
        with Path(options["log"] + ".ranks").open("a") as log:
            log.write(json.dumps(request["arguments"].get("routed_dp_rank")) + "\n")
        if set(ids) & set(options.get("die", [])):
            os._exit(1)
        if set(ids) & set(options.get("die_once", [])) and not Path(options["log"] + ".died").exists():
            Path(options["log"] + ".died").touch()
            os._exit(1)
        if set(ids) & set(options.get("dying", [])) and not Path(options["log"] + ".died").exists():
            if not dying:  # errors, one after the other, and soon the end
                dying = True
                threading.Timer(0.3, die, [options["log"] + ".died"]).start()
            write(message({"id": request["id"], "error": "RuntimeError: the scheduler is gone"}))
            continue
        reason: dict[str, object] = {"type": "stop", "matched": 1}
        if set(ids) & set(options.get("nan", [])):
            reason = {"type": "stop", "matched": "NaN happened"}
        if set(ids) & set(options.get("abort", [])):
            reason = {"type": "abort", "message": "no room"}
        if request["arguments"]["sampling_params"]["max_new_tokens"] == 0:
            if set(ids) & set(options.get("unscorable", [])):
                write(message({"id": request["id"], "error": "ValueError: too long"}))
                continue
            scored = ids[request["arguments"]["logprob_start_len"] :]
            found = [[None, *[-0.25] * (len(scored) - 1)], scored]
            answer: dict[str, Any] = {"finish_reason": reason_of("length"), "input_token_logprobs": found}
            small, numbers = packed(answer)
            write(message({"id": request["id"], "answer": small}, numbers))
            continue
        if set(ids) & set(options.get("error", [])):
            write(message({"id": request["id"], "error": "ValueError: exceeds context length"}))
            continue
        if "slow" in options:
            time.sleep(options["slow"])
        response = [ids[-1], ids[-1] + 1, 1]
        answer = {
            "finish_reason": reason,
            "output_ids": response,
            "output_token_logprobs": [[-0.5] * len(response), response],
        }
        small, numbers = packed(answer)
        data = message({"id": request["id"], "answer": small}, numbers)
        for kind, cut in (("torn", len(data) // 2), ("short", len(data) - 1)):
            if set(ids) & set(options.get(kind, [])) and not Path(f"{options['log']}.{kind}").exists():
                Path(f"{options['log']}.{kind}").touch()
                write(data[:cut])
                os._exit(1)
        write(data)


if __name__ == "__main__":
    main()
