"""What can be known of the cluster samples without a cluster: syntax, lint, schema, that parts agree.

tests/cluster runs samples/slurm on a real Slurm, tests/sglang holds the teacher server's options against SGLang.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gftdata.config import GenerateConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"
BIN = Path(sys.executable).parent  # shellcheck and hadolint come from PyPI
SCRIPTS = sorted(
    [*SAMPLES.rglob("*.sh"), *SAMPLES.rglob("*.sbatch"), *ROOT.rglob("tests/cluster/*.sh"), ROOT / ".ci/run"]
)


def run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts(script: Path) -> None:
    run("sh" if script.read_text().startswith("#!/bin/sh") else "bash", "-n", script)
    run(BIN / "shellcheck", script)


def test_every_option_of_sbatch_can_be_overridden() -> None:
    """Directives end at the first command: one after it would be dropped without a word."""
    for script in SAMPLES.rglob("*.sbatch"):
        lines = script.read_text().splitlines()
        directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert directives and max(directives) < first, script
        assert all("  #" not in lines[number] for number in directives), "a comment would become part of the option"


def test_dockerfile() -> None:
    file = SAMPLES / "container" / "Dockerfile"
    run(BIN / "hadolint", file)
    text = file.read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())
    let_through = (SAMPLES / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for names in copied for name in names.split()} <= set(let_through)
    (version,) = re.findall(r"sglang==(\S+)", text)
    assert f"sglang=={version}\n" in (ROOT / "constraints-sglang.txt").read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] not in ("root", "0")


@pytest.fixture
def resources() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SAMPLES / "kubernetes" / "generate-job.yaml").read_text()))


def test_kubernetes_job_against_the_schema(resources: list[dict[str, Any]]) -> None:
    run(BIN / "kubernetes-validate", "--strict", SAMPLES / "kubernetes" / "generate-job.yaml")
    job = resources[1]["spec"]
    pod = job["template"]["spec"]
    environment = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert int(environment["GFT_TASKS"]) == job["completions"] == job["parallelism"]
    # what the API server asks for beyond the schema
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert {
        rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    } == {pod["containers"][0]["name"]}
    saved = [
        rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if 75 in rule.get("onExitCodes", {}).get("values", [])
    ]
    assert saved == ["Ignore"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_a_mistake_in_the_job_would_be_found(resources: list[dict[str, Any]], tmp_path: Path) -> None:
    resources[1]["spec"]["backofLimitPerIndex"] = 3
    (tmp_path / "job.json").write_text(json.dumps(resources[1]))
    with pytest.raises(AssertionError, match="backofLimitPerIndex"):
        run(BIN / "kubernetes-validate", "--strict", tmp_path / "job.json")


def test_configs_are_valid(resources: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "generate.yaml").write_text(resources[0]["data"]["generate.yaml"])
    load_config(GenerateConfig, tmp_path / "generate.yaml")
    asked = load_config(GenerateConfig, SAMPLES / "teacher-server" / "generate.yaml").responses.teachers[0]
    assert asked.engine is not None and asked.engine.name == "server" and asked.engine.urls == ("TEACHER_URL",)
