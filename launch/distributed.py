"""Start of a run over several processes: who is there is read from the environment.

SLURM, GKE and TPU VMs are found by JAX itself (`jax/_src/clusters`); everywhere else three
variables say it: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
JAX_PROCESS_ID. One process alone starts nothing and waits for nobody.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping

TIMEOUT = 300  # seconds until every process must have come

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# a step of srun has all of these; a shell inside an allocation lacks the third
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # the first that is set counts
_ALONE = f"or set {COUNT}=1 to run one process alone"


@dataclasses.dataclass(frozen=True)
class Start:
    """How this process joins the others.

    Attributes:
      kind: alone, variables, slurm, open mpi, gke tpu, tpu vm or kubernetes.
      coordinator: host:port of process 0, or None where JAX finds it.
      count: processes, or None where JAX finds it.
      index: number of this process, or None where JAX finds it.
      every_device: this process takes all devices of its machine; JAX would give a SLURM process
        one of them.
    """

    kind: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    every_device: bool = False


def detect(env: Mapping[str, str], *, sees_tpu: bool, kubernetes: bool = False) -> Start:
    """Return how a process with these variables starts; looks at nothing else.

    Args:
      env: environment variables.
      sees_tpu: the machine has TPU chips and the library for them.
      kubernetes: the Python package `kubernetes` is there, with which JAX asks the cluster.

    Raises:
      ValueError: the variables contradict each other, or one is missing.
    """
    address, count, index = env.get(ADDRESS), _number(env, COUNT), _number(env, INDEX)
    if index is None and count is not None:
        index = _number(env, "JOB_COMPLETION_INDEX")  # of an indexed Kubernetes job
    if count == 1 and not index:
        return Start("alone")
    if count is not None or index is not None:
        return _from_variables(address, count, index)
    found = _from_cluster(env, sees_tpu, kubernetes)
    if address is not None and found.kind == "alone":
        return _from_variables(address, count, index)
    return dataclasses.replace(found, coordinator=address)


def initialize(timeout: int = TIMEOUT) -> Start:
    """Join the other processes, if there are any; call it before anything touches a device.

    When not all of them come in time, this process says so and ends with status 1.

    Args:
      timeout: seconds to wait for the others.

    Returns:
      What was found; `jax.process_index()` and `jax.process_count()` say the rest.

    Raises:
      ValueError: see `detect`.
      RuntimeError: a device was touched before.
    """
    import jax

    start = detect(
        os.environ,
        sees_tpu=_sees_tpu(os.environ),
        kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    if start.kind == "alone":
        return start
    devices = [] if start.every_device and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    with _time_limit(timeout, start):
        jax.distributed.initialize(
            start.coordinator,
            start.count,
            start.index,
            local_device_ids=devices,  # [] leaves them all; None lets JAX choose
            initialization_timeout=timeout + 60,
        )
    return start


def shutdown() -> None:
    """Leave the other processes; does nothing in a process that is alone."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def _time_limit(seconds: float, start: Start) -> Iterator[None]:
    """End the process with a message: JAX's own limit aborts it with a stack dump."""

    def end():
        where = start.coordinator or f"what {start.kind} names"
        which = "" if start.index is None else f" (this is {start.index} of {start.count})"
        print(
            f"error: not every process came to the coordinator, {where}, within {seconds} s"
            f"{which}; see that all of them run, that they can reach that address, and that no "
            "proxy variable is in the way",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread waits inside JAX and sees no exception

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _from_variables(address: str | None, count: int | None, index: int | None) -> Start:
    values = {ADDRESS: address, COUNT: count, INDEX: index}
    missing = [name for name, value in values.items() if value is None]
    given = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    if missing:
        raise ValueError(
            f"{given} {'is' if len(missing) == 2 else 'are'} set but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; a run over several processes needs all "
            f"three, {_ALONE}"
        )
    if not 0 <= index < count:
        raise ValueError(f"{given}: {INDEX} counts from 0 and must be below {COUNT}")
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{ADDRESS} is {address!r}; expected host:port of process 0")
    return Start("variables", address, count, index)


def _from_cluster(env: Mapping[str, str], sees_tpu: bool, kubernetes: bool) -> Start:
    """The first cluster in JAX's own order that these variables describe."""
    if "OMPI_MCA_orte_hnp_uri" in env:
        return Start("open mpi" if _number(env, "OMPI_COMM_WORLD_SIZE") != 1 else "alone")
    if (_number(env, "SLURM_NTASKS") or 1) > 1:
        missing = [name for name in _SLURM if name not in env]
        if missing:
            raise ValueError(
                f"SLURM_NTASKS={env['SLURM_NTASKS']} but {', '.join(missing)} is not set: this "
                f"process was not started by srun. Start it with srun, {_ALONE}"
            )
        return Start("slurm", every_device=_slurm_tasks_here(env) == 1 or _one_gpu(env))
    hosts = next((env[name] for name in _TPU_HOSTS if name in env), None)
    slices = _number(env, "MEGASCALE_NUM_SLICES") or 1
    if hosts is not None and len(hosts.split(",")) * slices > 1:
        if not sees_tpu:
            raise ValueError(
                f"TPU hosts {hosts} are named but JAX sees no TPU here: pip install jax[tpu] on "
                f"every host, {_ALONE}"
            )
        if "TPU_WORKER_ID" not in env:
            raise ValueError(f"TPU hosts {hosts} are named but TPU_WORKER_ID is not set")
        return Start("gke tpu")
    if hosts is not None:
        return Start("alone")
    if sees_tpu and "TPU_SKIP_MDS_QUERY" not in env:
        return Start("tpu vm")  # JAX asks the machine's metadata server for the others
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if not kubernetes:
            raise ValueError(
                "JOB_COMPLETION_INDEX is set, so this is one pod of an indexed Kubernetes job; set "
                f"{ADDRESS} and {COUNT} in the job, {_ALONE}"
            )
        return Start("kubernetes")
    return Start("alone")


def _slurm_tasks_here(env: Mapping[str, str]) -> int | None:
    """Tasks of this step on each node, from e.g. `1(x2)`; None where nodes differ."""
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or ""
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", counts)
    return int(match[1]) if match else None


def _one_gpu(env: Mapping[str, str]) -> bool:
    """Whether SLURM shows a task its one GPU, which is number 0 for it whatever its own number."""
    return len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1


def _sees_tpu(env: Mapping[str, str]) -> bool:
    # importing JAX sets the first where there are chips and libtpu
    asked = env.get("JAX_PLATFORMS") or "tpu"
    return env.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in asked.split(",")


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value in (None, ""):
        return None
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}; expected a whole number")
    return int(value)
