"""A sweep on a real SLURM of one node, which the test starts: `make test-cluster` (apt-get install slurm-wlm munge)."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.config import compose
from bench.record import Record
from bench.run import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(any(shutil.which(p, path=PATH) is None for p in PROGRAMS), reason="SLURM is not installed"),
]
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=3600
KillWait=5
EnforcePartLimits=ALL
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=2 RealMemory=1000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which SLURM's commands reach a running node."""
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # munge wants every folder above its socket to be safe
    folder.mkdir(mode=0o755)
    for name, mode in (("key", 0o700), ("state", 0o700), ("spool", 0o700), ("munge", 0o755)):
        (folder / name).mkdir(mode=mode)
    key = folder / "key" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    values = {"host": socket.gethostname().split(".")[0], "ctld": free_port(), "node": free_port(), "user": user}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, **values))
    env = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    munge = ["munged", f"--key-file={key}", f"--seed-file={folder}/key/seed", f"--log-file={folder}/key/log"]
    munge += [f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid"]
    try:
        for command in (munge, ["slurmctld"], ["slurmd", "-N", "n1"]):
            subprocess.run(command, env=env, check=True, timeout=60)
        wait_for(lambda: "idle" in slurm(env, "sinfo", "-h", "-N", "-o", "%T"), 60, "no node")
        yield env
    finally:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            slurm(env, "scancel", "--user", user)
            wait_for(lambda: not slurm(env, "squeue", "-h"), 60, "jobs that do not end")
        leave_nothing(folder)


def leave_nothing(folder):
    """End the daemons, and what they started: a step outlives a node that is gone, and waits for it for ever."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 20
        while (left := started(folder)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


def started(folder):
    """The processes of this cluster: those that know its configuration, but for this one, and munge."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if str(folder).encode() in known and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def slurm(env, *command):
    """What a command of SLURM prints."""
    done = subprocess.run(command, env=env, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


CELL = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:64,val:24,test:24}", "wandb=off"]
CELL += ["train.batch_size=8", "train.eval_every=50", "task.max_length=64", "train.checkpoint_seconds=0.1"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]


def sweep(folder, env, *overrides):
    """Start a sweep whose jobs SLURM runs, alone in the queue; its output goes to a file beside its results."""
    wait_for(lambda: not slurm(env, "squeue", "-h"), 60, "a job whose run has ended does not leave the queue")
    command = [sys.executable, "-m", "bench", "-m", *CELL, *SLURM, f"results={folder}", *overrides]
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def written(folder):
    """What a sweep and its jobs have written."""
    logs = (Path(f"{folder}.log"), *folder.rglob(".submitit/*/*.out"), *folder.rglob("*.log"))
    return "\n".join(p.read_text() for p in logs)


def ended(process, folder, seconds=500):
    """Wait for a sweep that must succeed; what it and its jobs wrote."""
    try:
        assert process.wait(seconds) == 0, written(folder)
    finally:
        process.kill()
    assert not list((folder / ".claims").iterdir())
    return written(folder)


def numbers(folder):
    records = [Record.load(p) for p in folder.glob("*/record.json")]
    return {r.id: (r.status, r.score, r.metrics, r.history, r.selected_step) for r in records}


def undisturbed(folder, *cells):
    """The numbers of the same runs in this process."""
    for cell in cells:
        run(compose([*CELL, *cell, f"results={folder}"]))
    return numbers(folder)


def checkpoints(folder):
    return {p.parent.name for p in folder.glob("*/checkpoint.safetensors")}


def running(env, count):
    """The ids of `count` jobs, once they run."""
    ask = ("squeue", "-h", "-r", "-t", "R", "-o", "%i")
    return wait_for(lambda: len(ids := slurm(env, *ask).split()) == count and ids, 240, "the jobs do not run")


def test_an_array_that_is_warned_and_preempted_ends_as_the_undisturbed_sweep(tmp_path, cluster):
    folder, long = tmp_path / "slurm", ["train.steps=400"]
    process = sweep(folder, cluster, *long, "method=lora,bitfit", "hydra.launcher.timeout_min=30")
    first, second = running(cluster, 2)
    wait_for(lambda: len(checkpoints(folder)) == 2, 240, lambda: written(folder))
    slurm(cluster, "scancel", "--signal=USR2", first)  # as SLURM does before the time limit
    slurm(cluster, "scontrol", "requeue", second)
    plain = undisturbed(tmp_path / "plain", [*long, "method=lora"], [*long, "method=bitfit"])
    assert ended(process, folder).count("going on from step") >= 2
    assert numbers(folder) == plain


def test_at_its_time_limit_a_job_is_queued_again_and_goes_on(tmp_path, cluster):
    folder = tmp_path / "slurm"
    long = ["train.steps=100000", "train.eval_every=100000"]
    process = sweep(folder, cluster, *long, "method=lora", "hydra.launcher.timeout_min=30")
    (job,) = running(cluster, 1)
    wait_for(lambda: checkpoints(folder), 240, lambda: written(folder))
    slurm(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=2")  # the warning is due 120 s before
    wait_for(lambda: "Restarts=1" in slurm(cluster, "scontrol", "show", "job", job), 240, lambda: written(folder))
    slurm(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait_for(lambda: re.search(r"going on from step [1-9]", written(folder)), 240, lambda: written(folder))
    assert "Caught signal SIGUSR2" in written(folder)
    process.kill()
    slurm(cluster, "scancel", job)


def test_the_job_script_of_the_readme_passes_the_warning_on_to_torchrun(tmp_path, cluster):
    """Two processes under torchrun, which does not know SLURM's signal; the job is queued again and goes on."""
    folder, cell = tmp_path / "slurm", ["train.steps=400", "method=lora"]
    script = textwrap.dedent(re.search(r"(?:    .*\n)*    torchrun .*& wait \$!\n", README).group())
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone"
    command = " ".join([*map(shlex.quote, CELL), *cell, f"results={folder}"])
    script, count = re.subn(r"^torchrun (.* -m bench).* & ", rf"{torchrun} \1 {command} & ", script, flags=re.M)
    assert count == 1 and script.startswith("#!/bin/bash")
    (tmp_path / "job.sh").write_text(script)
    job = slurm(
        cluster,
        "sbatch",
        "--parsable",
        "--open-mode=append",
        f"--chdir={ROOT}",
        f"--output={tmp_path}/out",
        str(tmp_path / "job.sh"),
    )
    said = (tmp_path / "out").read_text
    wait_for(lambda: checkpoints(folder), 240, said)
    slurm(cluster, "scancel", "--batch", "--signal=USR2", job.strip())  # as --signal=B:USR2@120 does
    wait_for(lambda: not slurm(cluster, "squeue", "-h", "--job", job.strip()), 300, said)
    assert "stopped by SIGTERM" in said() and "going on from step" in said()
    (found,), (plain,) = numbers(folder).values(), undisturbed(tmp_path / "plain", cell).values()
    assert found[0] == "ok" and found[4] == plain[4] and found[1] == pytest.approx(plain[1])
