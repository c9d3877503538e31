"""A Slurm cluster of three nodes on this machine, in a folder of its own: real munged, slurmctld and three slurmd.

It needs root, and neither systemd nor cgroups. Every node has the machine's address and a port of its own; its name
does not resolve, and its two GPUs are numbers with nothing behind.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2", "n3")
GONE = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# a requeued job starts again when its credential has expired, after two minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=6
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
# jobs that have ended stay to be asked about
MinJobAge=3600
KillWait=20
MailProg=/bin/true
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running cluster."""

    folder: Path  # configuration, logs, state
    environment: Mapping[str, str]  # of everything that speaks to it, and so of its jobs


@dataclass(frozen=True, slots=True)
class Job:
    """A job, or a task of a job array, as Slurm describes it."""

    id: str  # of an array's task JOB_TASK: the number alone may be that of the whole array
    task: int | None  # in its array
    state: str
    exit_code: int
    restarts: int
    node: str
    reason: str


def missing_parts() -> str:
    """Why no cluster can be started here; empty where one can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"needs Slurm ({', '.join(missing)} not found); `make test-cluster` installs it"
    return "" if os.geteuid() == 0 else "needs root to start Slurm's daemons; `make test-cluster` asks sudo"


@contextmanager
def running_slurm(folder: Path, environment: Mapping[str, str]) -> Iterator[Slurm]:
    """A cluster whose jobs find `environment`; all of it has ended afterwards, whatever happened."""
    configuration = folder / "slurm.conf"
    path = f"{environment['PATH']}:/usr/sbin:/sbin"
    cluster = Slurm(folder, {**environment, "PATH": path, "SLURM_CONF": str(configuration)})
    first, *others = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2"
        for name, port in zip(NODES, others, strict=True)
    ]
    configuration.write_text(
        CONFIG.format(folder=folder, host=host, port=first, nodes="\n".join(nodes), names=",".join(NODES))
    )
    # a GPU needs a device file to be believed in
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    with ExitStack() as stack:
        _start(cluster, stack, "munged", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in MUNGE.items()))
        _start(cluster, stack, "slurmctld", "-f", str(configuration))
        for name in NODES:
            _start(cluster, stack, "slurmd", "-f", str(configuration), "-N", name)
        stack.callback(_end_jobs, cluster)
        wait_until(lambda: command(cluster, "sinfo", "-h", "-o", "%D %t") == f"{len(NODES)} idle", 30, cluster)
        yield cluster


MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _start(cluster: Slurm, stack: ExitStack, *words: str) -> None:
    """Start a daemon in the foreground, so that it is a child of this process, and see to its end."""
    foreground = "--foreground" if words[0] == "munged" else "-D"
    log = cluster.folder / f"{'-'.join(w for w in (words[0], *words[-1:]) if '/' not in w)}.out"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [words[0], foreground, *words[1:]],
            env=dict(cluster.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    stack.callback(_end, process)
    if words[0] == "munged":
        wait_until((cluster.folder / "munge.socket").exists, 10, cluster)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(cluster: Slurm) -> None:
    """Jobs outlive their daemons: they are killed first, and what slurmd does not know of any more by its folder."""
    subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=dict(cluster.environment), check=False)
    subprocess.run(["scancel", "--user=root"], env=dict(cluster.environment), check=False)
    with suppress(TimeoutError):
        wait_until(lambda: not command(cluster, "squeue", "-h"), 20, cluster)
    for pid in processes_of(cluster):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(cluster: Slurm) -> list[int]:
    """Processes of the cluster's jobs: those whose environment has its slurm.conf and a job's number."""
    mark = f"SLURM_CONF={cluster.folder / 'slurm.conf'}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = entry.read_bytes().split(b"\0")
            if mark in variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables):
                found.append(int(entry.parent.name))
    return found


def command(cluster: Slurm, *words: str, timeout: float = 60, **environment: str) -> str:
    """What a command of Slurm, or a script that calls some, prints; it must succeed."""
    done = attempt(cluster, *words, timeout=timeout, **environment)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def attempt(cluster: Slurm, *words: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `command`, and it may fail."""
    return subprocess.run(
        words,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def submit(cluster: Slurm, *words: str, **environment: str) -> str:
    """`sbatch` with these words; the job's number. What it prints goes to the cluster's folder."""
    name = "%A-%a" if any(word.startswith("--array") for word in words) else "%j"
    output = f"--output={cluster.folder}/job-{name}.txt"
    return command(cluster, "sbatch", "--parsable", output, *words, **environment)


def jobs(cluster: Slurm, job: str) -> list[Job]:
    """A job, or the tasks of a job array in their order."""
    found = []
    for line in command(cluster, "scontrol", "show", "job", "-o", job).splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        task = facts.get("ArrayTaskId", "")
        found.append(
            Job(
                f"{facts['ArrayJobId']}_{task}" if task.isdigit() else facts["JobId"],
                int(task) if task.isdigit() else None,
                facts["JobState"],
                int(facts["ExitCode"].partition(":")[0]),
                int(facts["Restarts"]),
                facts.get("NodeList", ""),
                facts.get("Reason", ""),
            )
        )
    return sorted(found, key=lambda each: each.task or 0)


def wait_for(cluster: Slurm, job: str, timeout: float = 180) -> list[Job]:
    """Wait until a job, with all tasks of an array, has ended for good; how."""
    wait_until(lambda: all(each.state in GONE for each in jobs(cluster, job)), timeout, cluster)
    return jobs(cluster, job)


def wait_until(condition: Callable[[], object], timeout: float, cluster: Slurm) -> None:
    """Wait for something. TimeoutError shows the queue and what the jobs have printed last."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            queue = attempt(cluster, "squeue", "-t", "all").stdout
            raise TimeoutError(f"not within {timeout:.0f} s:\n{queue}{printed(cluster)[-8000:]}")
        time.sleep(0.05)


def signal_steps(cluster: Slurm, job: str, name: str) -> None:
    """Send a signal to the processes of a job that srun has started, as `--signal` does before the time limit."""
    command(cluster, "scancel", f"--signal={name}", job)


def printed(cluster: Slurm, job: str = "") -> str:
    """What a job has printed, or all that were submitted with `submit`."""
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(cluster.folder.glob(f"job-{job}*.txt")))
