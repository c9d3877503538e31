"""samples/rl/chain.sh as it stands, with fewer prompts."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_sft_then_gft_then_grpo(trl_python: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TRL_PYTHON": trl_python,
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = ["sh", "samples/rl/chain.sh", str(tmp_path / "chain"), "64"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    table = done.stdout.splitlines()[-5:]
    assert [line.split()[0] for line in table] == ["after", "base", "sft", "gft", "grpo"]
    for line in table[1:]:
        assert 0 < float(re.split(r"\s+", line)[1]) <= 1
    for stage in ("sft", "gft", "grpo"):
        assert (tmp_path / "chain" / stage / "final" / "model.safetensors").is_file()
