"""A sweep on a real SLURM of one node, which the test starts: `make test-cluster` (apt-get install slurm-wlm munge)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.record import Record

ROOT = Path(__file__).parents[1]
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
        state = ["sinfo", "-h", "-N", "-o", "%T"]
        wait_for(lambda: "idle" in subprocess.run(state, env=env, capture_output=True, text=True).stdout, 60, "no node")
        yield env
    finally:
        for pid in (*folder.glob("*.pid"), folder / "munge" / "pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder, env, *overrides):
    cell = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:64,val:24,test:24}", "wandb=off"]
    cell += ["train.batch_size=8", "train.eval_every=50", "task.max_length=64", "method=lora,bitfit"]
    cell += ["train.steps=150", "train.checkpoint_seconds=0.1", f"results={folder}", *overrides]
    command = [sys.executable, "-m", "bench", "-m", *cell]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=30")


def numbers(folder):
    records = [Record.load(p) for p in folder.glob("*/record.json")]
    return {r.id: (r.status, r.score, r.metrics, r.history, r.selected_step) for r in records}


def begun(process, folder):
    """Whether a run has a checkpoint; the sweep must still be waiting for it."""
    assert process.poll() is None, process.communicate()[0]
    return any(folder.glob("*/checkpoint.safetensors"))


@pytest.mark.parametrize("how", ["warned of the time limit", "preempted"])
def test_an_array_that_is_disturbed_ends_as_the_undisturbed_sweep(tmp_path, cluster, how):
    plain = sweep(tmp_path / "plain", cluster)
    disturbed = sweep(tmp_path / "slurm", cluster, *SLURM)
    wait_for(lambda: begun(disturbed, tmp_path / "slurm"), 240, "no job wrote a checkpoint")
    running = ["squeue", "-h", "-r", "-t", "R", "-o", "%i"]
    jobs = subprocess.run(running, env=cluster, capture_output=True, text=True, check=True).stdout.split()
    assert jobs
    for job in jobs:
        action = ["scancel", "--signal=USR2"] if how.startswith("warned") else ["scontrol", "requeue"]
        subprocess.run([*action, job], env=cluster, check=True, timeout=60)
    output = disturbed.communicate(timeout=500)[0]
    assert plain.wait(300) == 0
    assert disturbed.returncode == 0, output
    assert numbers(tmp_path / "slurm") == numbers(tmp_path / "plain")
    logs = "".join(p.read_text() for p in (tmp_path / "slurm").rglob(".submitit/*/*.out"))
    assert "going on from step" in logs or "going on from step" in "".join(
        p.read_text() for p in (tmp_path / "slurm").rglob("*.log")
    ), logs
    assert not list((tmp_path / "slurm" / ".claims").iterdir())
