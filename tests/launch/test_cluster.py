"""The recipes for clusters, as far as a machine without a cluster can check them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.plan import targets

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["gpu.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_recipes_are_shell(file):
    subprocess.run(["bash", "-n", ROOT / "launch/cluster" / file], check=True)


def test_recipes_for_gke_match_their_targets():
    yaml = pytest.importorskip("yaml")
    for name in ("v5e-64", "v6e-32"):
        file = ROOT / f"launch/cluster/gke_{name.replace('-', '_')}.yaml"
        spec = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod, target = spec["template"]["spec"], targets.parse(name)
        chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert spec["parallelism"] == spec["completions"] == target.hosts
        assert chips * target.hosts == target.devices
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert topology == target.topology.split(":")[1]
        assert "--resume" in pod["containers"][0]["args"]


def test_xla_knows_the_flags_of_the_gpu_recipe():
    """An unknown flag ends the process; they are read on a CPU as well."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL")
    }
    script = "source launch/cluster/gpu.sh && exec $0 -c 'import jax; jax.devices()'"
    command = ["bash", "-c", script, sys.executable]
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


FAKES = {
    # a trainer that takes a while to save
    "srun": "echo $$ > pid; trap 'sleep .2; echo saved >> log; exit 143' TERM; "
    'echo "$@" > arguments; while :; do sleep .05; done',
    "scancel": 'echo "$@" >> log; kill -TERM "$(cat pid)"',
    "scontrol": 'echo "$@" >> log',
}


@pytest.mark.parametrize(
    ("sent", "log"),
    [
        (signal.SIGUSR1, ["--signal=TERM 7", "saved", "requeue 7"]),  # the time limit is near
        (signal.SIGTERM, ["--signal=TERM 7", "saved"]),  # preempted: SLURM queues it again itself
    ],
)
def test_the_slurm_job_saves_before_it_ends(tmp_path, sent, log):
    """The script itself, between stand-ins for SLURM's commands."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for file in ("venv/bin/activate", "launch/cluster/gpu.sh"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "launch/cluster/slurm.sbatch", "--config=x", "--workdir=y"]
    own = {"SLURM_JOB_ID": "7", "VENV": "venv"}
    job = subprocess.Popen(command, cwd=tmp_path, env={**env, **own}, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "arguments").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(sent)
        assert job.wait(30) == 143
    finally:
        job.kill()
    assert (tmp_path / "log").read_text().splitlines() == log
    given = (tmp_path / "arguments").read_text()
    assert given.endswith("launch.train --resume --config=x --workdir=y\n")
