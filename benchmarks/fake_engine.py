"""Stands for `sglang_worker.py` where only our own cost is measured: answers at once, with made-up tokens.

python fake_engine.py FD OPTIONS_JSON       options: {"num_tokens": T, "alphabet": [ids, the last of them ends]}
"""

import json
import os
import sys

from gftdata.engines.sglang_worker import message, packed


def main() -> None:
    options = json.loads(sys.argv[2])
    *letters, end = options["alphabet"]
    answers = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
    answers.write(message({"ready": "fake"}))
    for line in sys.stdin:
        request = json.loads(line)
        arguments = request["arguments"]
        ids = arguments["input_ids"]
        if arguments["sampling_params"]["max_new_tokens"] == 0:
            scored = ids[arguments["logprob_start_len"] :]
            found = [[None, *[-0.123456789] * (len(scored) - 1)], scored]
            answer = {"finish_reason": {"type": "length"}, "input_token_logprobs": found}
        else:
            # another response for each sample: some letters, then the end
            said = [letters[(request["id"] * 7 + n * n) % len(letters)] for n in range(options["num_tokens"] - 1)]
            response = [*said, end]
            answer = {
                "finish_reason": {"type": "stop", "matched": end},
                "output_ids": response,
                "output_token_logprobs": [[-0.123456789] * len(response), response],
            }
        small, numbers = packed(answer)
        answers.write(message({"id": request["id"], "answer": small}, numbers))


if __name__ == "__main__":
    main()
