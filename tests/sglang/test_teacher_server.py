"""The options that samples/teacher-server gives to SGLang, read by SGLang's own parser."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "teacher-server"
# srun runs its command once, as the second node's; whatever Python SGLang has been given prints what it was asked
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n'
SCONTROL = "#!/bin/sh\necho node3\necho node4\n"
SHOW = '#!/bin/sh\nexec "$REAL_PYTHON" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"\n'
PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
given = json.loads(sys.argv[1])
parsed = vars(parser.parse_args(given["argv"]))
known = parser._option_string_actions
print(json.dumps({"parsed": {name: parsed[name] for name in given["names"]},
                  "unknown": [option for option in given["options"] if option not in known]}))
"""


def test_the_options_of_the_server(engine_settings: dict[str, Any], tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "show": SHOW}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    ready = tmp_path / "ready.yaml"
    slurm = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    python = str(engine_settings["python"])
    done = subprocess.run(
        [
            "bash",
            SAMPLE / "teacher.sbatch",
            "some/model",
            SAMPLE / "generate.yaml",
            ready,
            "--mem-fraction-static",
            "0.8",
        ],
        env={
            **os.environ,
            **slurm,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SGLANG_PYTHON": str(tools / "show"),
            "REAL_PYTHON": python,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    module, *argv = json.loads(done.stdout.splitlines()[-1])[1:]
    assert module == "sglang.launch_server"
    assert 'urls: ["http://node3:30000"]' in ready.read_text() and 'TEACHER_URL"' not in ready.read_text()

    named = re.findall(r"`(--[a-z-]+)", (SAMPLE / "README.md").read_text())
    names = ["model_path", "host", "port", "tp_size", "nnodes", "node_rank", "dist_init_addr", "mem_fraction_static"]
    given = json.dumps({"argv": argv, "names": names, "options": named})
    parsed = subprocess.run([python, "-c", PARSE, given], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr[-2000:]
    found = json.loads(parsed.stdout.splitlines()[-1])
    assert found["unknown"] == []
    assert list(found["parsed"].values()) == ["some/model", "0.0.0.0", 30000, 8, 2, 1, "node3:31000", 0.8]
