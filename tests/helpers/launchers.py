"""What the tests of ranks share: the variables by which launchers are known, and environments without them."""

import os

from harness import LAUNCHER_VARIABLES, ROOT
from training import on_one_cpu

from improved_diffusion import dist_util

OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS")


def no_launcher(monkeypatch):
    """One process on a CPU, whatever started the tests, that nobody has given a seed."""
    on_one_cpu(monkeypatch)
    for name in [*OPEN_MPI, *MPICH, *TORCHRUN, *SLURM, *SLURM_STEP, "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist_util, "_seed", None)


def started_by(monkeypatch, variables, *values):
    for name, value in zip(variables, values, strict=False):
        monkeypatch.setenv(name, str(value))


def clean_environment():
    outside = [*LAUNCHER_VARIABLES, *OPEN_MPI, *MPICH, "OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"]
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    return {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
