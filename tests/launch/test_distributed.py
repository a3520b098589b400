"""Joining other processes: what the environment says, and two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.distributed import Start, detect

ROOT = Path(__file__).parents[2]
PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "0"}


def without(env: dict, *names: str) -> dict:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "sees_tpu", "kind"),
    [
        ({}, False, "alone"),
        ({"HOME": "/root"}, False, "alone"),
        ({"JAX_NUM_PROCESSES": "1"}, False, "alone"),
        ({**SLURM, "JAX_NUM_PROCESSES": "1"}, False, "alone"),
        ({**SLURM, "SLURM_NTASKS": "1"}, False, "alone"),
        ({"SLURM_JOB_ID": "77"}, False, "alone"),
        (SLURM, False, "slurm"),
        (
            {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"},
            False,
            "open mpi",
        ),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"}, False, "alone"),
        (GKE, True, "gke tpu"),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost"}, True, "alone"),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "gke tpu"),
        ({}, True, "tpu vm"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, "alone"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, "alone"),
    ],
)
def test_what_is_found(env, sees_tpu, kind):
    assert detect(env, sees_tpu=sees_tpu).kind == kind


def test_plain_variables():
    assert detect(PLAIN, sees_tpu=False) == Start("variables", "10.0.0.1:1234", 4, 3)
    pod = {**without(PLAIN, "JAX_PROCESS_ID"), "JOB_COMPLETION_INDEX": "2"}
    assert detect(pod, sees_tpu=False).index == 2
    # a cluster knows its processes; only the address is given
    given = {**SLURM, "JAX_COORDINATOR_ADDRESS": "node1:9"}
    assert detect(given, sees_tpu=False).coordinator == "node1:9"


def test_a_process_per_node_takes_all_of_its_devices():
    assert detect(SLURM, sees_tpu=False).every_device
    eight = {**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    assert not detect(eight, sees_tpu=False).every_device
    assert detect({**eight, "CUDA_VISIBLE_DEVICES": "5"}, sees_tpu=False).every_device


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (without(PLAIN, "JAX_PROCESS_ID"), "but JAX_PROCESS_ID is not"),
        (without(PLAIN, "JAX_NUM_PROCESSES"), "but JAX_NUM_PROCESSES is not"),
        (without(PLAIN, "JAX_COORDINATOR_ADDRESS"), "but JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not"),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, "must be below"),
        ({**PLAIN, "JAX_PROCESS_ID": "one"}, "'one'; expected a whole number"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "expected host:port"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "Start it with srun"),
        ({**GKE, "no": "tpu"}, "JAX sees no TPU"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "one pod of an indexed Kubernetes job",
        ),
    ],
)
def test_what_is_missing_is_named(env, message):
    with pytest.raises(ValueError, match=message):
        detect(env, sees_tpu=False)


PROGRAM = """
import sys
from launch import distributed
start = distributed.initialize(timeout=int(sys.argv[1]))
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), "x")
local = np.arange(2.0) + 2 * jax.process_index()
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), local)
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(x)
print(start.kind, jax.process_count(), len(jax.devices()), float(total))
distributed.shutdown()
"""


def started(timeout: int, env: dict) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "TPU_"))}
    fixed = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM, str(timeout)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**clean, **fixed, **env}, cwd=ROOT, **pipes)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", ["variables", "slurm"])
def test_two_processes_add_up_one_array(kind):
    port = free_port()
    plain = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    slurm = {
        **SLURM,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }
    own = {
        "variables": lambda i: {**plain, "JAX_PROCESS_ID": i},
        "slurm": lambda i: {**slurm, "SLURM_PROCID": i, "SLURM_LOCALID": i},
    }[kind]
    both = [started(100, own(str(i))) for i in range(2)]
    try:
        for process in both:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert out.splitlines()[-1] == f"{kind} 2 4 6.0", out  # below gloo's own lines
    finally:
        for process in both:
            process.kill()


def test_who_waits_in_vain_says_so():
    env = {**PLAIN, "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    process = started(2, {**env, "JAX_PROCESS_ID": "1"})
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and out == ""
    assert "error: not every process came to the coordinator" in err and "1 of 2" in err
    assert "Traceback" not in err
