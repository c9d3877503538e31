"""Stands for `sglang_worker.py` where only our own cost is measured: answers at once, with made-up tokens.

python fake_engine.py FD OPTIONS_JSON       options: {"response_tokens": T}
"""

import json
import os
import sys

from gftdata.engines.sglang_worker import packed


def main() -> None:
    num_tokens = json.loads(sys.argv[2])["response_tokens"]
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    answers.write(json.dumps({"ready": "fake"}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        arguments = request["arguments"]
        ids = arguments["input_ids"]
        if arguments["sampling_params"]["max_new_tokens"] == 0:
            scored = ids[arguments["logprob_start_len"] :]
            found = [[None, *[-0.123456789] * (len(scored) - 1)], scored]
            answer = {"finish_reason": {"type": "length"}, "input_token_logprobs": found}
        else:
            # another response for each sample: some digits, then the end
            digits = [5 + (request["id"] * 7 + n * n) % 10 for n in range(num_tokens - 1)]
            response = [*digits, 1]
            answer = {
                "finish_reason": {"type": "stop", "matched": 1},
                "output_ids": response,
                "output_token_logprobs": [[-0.123456789] * len(response), response],
            }
        answers.write(json.dumps({"id": request["id"], "answer": packed(answer)}) + "\n")


if __name__ == "__main__":
    main()
