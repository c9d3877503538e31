"""What the toy study needs beside the demo: weaker base models, and a teacher's answers to the training prompts.

    python samples/study/inputs.py --out runs/study

Weak bases are the demo's model trained for fewer steps (samples/demo/make_base.py, the same mixture); four of them take
about six minutes on two cores. The teacher answers in the three styles that the base knows best, with the slips of its
pre-training text: nine of ten answers are right. A base that is there is not made again.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
BASES = {"weak-1": (250, 60), "weak-2": (400, 100), "weak-3": (700, 180), "weak-4": (1200, 300)}
STYLES = ("steps", "running", "backwards")
TEACHER_ANSWERS = 7  # of each prompt


def write_bases(out: Path) -> None:
    """OUT/<name>/model for each of `BASES`: steps at the high and at the low learning rate."""
    for name, steps in BASES.items():
        if not (out / name / "model" / "model.safetensors").is_file():
            print(f"{name}: {steps[0]} + {steps[1]} steps", flush=True)
            command = [sys.executable, str(DEMO / "make_base.py"), "--out", str(out / name), "--steps"]
            subprocess.run([*command, *map(str, steps)], check=True, stdout=subprocess.DEVNULL)


def write_prompts(out: Path) -> None:
    """OUT/prompts.jsonl: the demo's training prompts, each with `TEACHER_ANSWERS` answers of a teacher."""
    sys.path.insert(0, str(DEMO))
    from make_base import answer_addition, make_slip

    rng = random.Random(7)
    slip = make_slip(rng)
    lines = []
    for line in (DEMO / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        a, b, c = map(int, row["question"].rstrip("=").split("+"))
        answers = [answer_addition(a, b, c, rng.choice(STYLES), slip) for _ in range(TEACHER_ANSWERS)]
        lines.append(json.dumps(row | {"solutions": answers}) + "\n")
    (out / "prompts.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out)
    write_bases(out / "bases")


if __name__ == "__main__":
    main()
