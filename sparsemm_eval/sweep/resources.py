"""Where a sweep's jobs are to run: this machine's slots, or what is asked of Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsemm_eval.errors import UserError, check_choice, check_int

LOCAL, SLURM = "local", "slurm"
# Numbers would be those of this process's own CUDA_VISIBLE_DEVICES; UUIDs are true everywhere.
_LIST_GPUS = (
    "import torch; "
    "[print(f'GPU-{torch.cuda.get_device_properties(n).uuid}') "
    "for n in range(torch.cuda.device_count())]"
)
# Seconds before the time limit at which Slurm announces it.
_NOTICE = 90
# srun, which submitit puts before the command, has not taken this over by itself since 22.05.
_SETUP = (
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
)  # fmt: skip
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class Resources:
    """Where jobs are to run, and how many at once, as it is given on the command line.

    Parameters
    ----------
    executor : {"local", "slurm"}
        This machine, or a cluster.
    gpus : int, optional
        Of each job; default 1, on a machine without GPUs none. The job that scores has none.
    max_parallel : int, optional
        Jobs that run at once, at most; default what the GPUs allow, on a CPU one.
    time : str, optional
        Slurm: limit of a job, minutes or as Slurm writes it (HH:MM:SS, D-HH:MM, …).
    partition, account, qos : str, optional
        Slurm: as for sbatch.
    setup : sequence of str
        Slurm: shell lines before each job.
    sbatch : sequence of str
        Slurm: other parameters of sbatch, as NAME=VALUE or NAME.
    """

    executor: str
    gpus: int | None = None
    max_parallel: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises
        ------
        UserError
            Naming the option. Partitions, accounts and GPUs are Slurm's to know.
        """
        check_choice("executor", self.executor, (LOCAL, SLURM))
        if self.executor == LOCAL:
            for name in ("time", "partition", "account", "qos", "setup", "sbatch"):
                if getattr(self, name):
                    raise UserError(f"{name}: it is Slurm's, and executor is local; leave it out")
            return
        find_submitit()
        self.minutes()
        if self.gpus is not None:
            check_int("gpus", self.gpus, least=0)
        if self.max_parallel is not None:
            check_int("max-parallel", self.max_parallel, least=1)
        for given in self.sbatch:
            if not re.fullmatch(r"[a-z][\w-]*(=.*)?", given):
                raise UserError(
                    f"sbatch={given!r}: give sbatch's long options without dashes, such as "
                    "mem=64G or exclusive"
                )

    @property
    def gpus_of_job(self) -> int:
        """GPUs of a job in Slurm."""
        return 1 if self.gpus is None else self.gpus

    def slots(self) -> tuple[Slot, ...]:
        """The slots of this machine.

        Raises
        ------
        UserError
            For more than it has.
        """
        import torch  # `status` asks Slurm, and is to start at once

        return make_slots(find_gpus(), self.gpus, self.max_parallel, torch.get_num_threads())

    def minutes(self) -> int:
        """The time limit for Slurm, in whole minutes.

        Raises
        ------
        UserError
            If it is missing, none, or zero, which Slurm takes for no limit.
        """
        if self.time is None:
            raise UserError(
                "time is missing: give a job's limit in minutes, HH:MM:SS or D-HH:MM:SS; a job "
                "that reaches it is requeued and goes on"
            )
        given = _TIME.fullmatch(self.time)
        if given is None:
            raise UserError(f"time={self.time!r}: give minutes, HH:MM:SS or D-HH:MM:SS")
        first, second, third = (int(given[name] or 0) for name in "abc")
        if given["d"] is not None:
            seconds = int(given["d"]) * 86_400 + first * 3600 + second * 60 + third
        elif given["c"] is not None:
            seconds = first * 3600 + second * 60 + third
        else:  # minutes, or minutes and seconds
            seconds = first * 60 + second
        if seconds == 0:
            raise UserError(
                f"time={self.time}: Slurm takes it for no limit; give minutes, HH:MM:SS or "
                "D-HH:MM:SS, a job that reaches its limit is requeued and goes on"
            )
        return -(-seconds // 60)

    def parameters(self, name: str) -> dict[str, Any]:
        """What submitit's executor takes for jobs of this name."""
        minutes = self.minutes()
        given = {
            "job_name": name, "time": minutes, "nodes": 1, "ntasks_per_node": 1,
            "partition": self.partition, "account": self.account, "qos": self.qos,
            "gpus_per_node": self.gpus_of_job or None, "array_parallelism": self.max_parallel,
            "signal_delay_s": min(_NOTICE, minutes * 15), "stderr_to_stdout": True,
            "setup": [*_SETUP, *self.setup],
        }  # fmt: skip
        pairs = (word.partition("=") for word in self.sbatch)
        more = {name: value if equal else True for name, equal, value in pairs}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**chosen, "additional_parameters": more}


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time.

    Parameters
    ----------
    gpus : tuple of str
        What its jobs see as their GPUs; none: they run on the CPU.
    threads : int
        Of its jobs on the CPU.
    """

    gpus: tuple[str, ...] = ()
    threads: int = 1

    def prefix(self) -> tuple[str, ...]:
        """What stands before a command, so that it keeps to the slot."""
        threads = () if self.gpus else (f"OMP_NUM_THREADS={self.threads}",)
        return ("env", f"CUDA_VISIBLE_DEVICES={','.join(self.gpus)}", *threads)


def make_slots(
    gpus: Sequence[str], each: int | None, most: int | None, threads: int
) -> tuple[Slot, ...]:
    """Part a machine into slots.

    Parameters
    ----------
    gpus : sequence of str
        Those that are there.
    each : int, optional
        How many a job gets; default one where there are any, else none, which is the CPU.
    most : int, optional
        At most so many slots; default as many as there are GPUs for, on the CPU one.
    threads : int
        Of the CPU, for all slots together.

    Raises
    ------
    UserError
        If a job is to have more GPUs than there are, or fewer than none.
    """
    each = min(1, len(gpus)) if each is None else each
    if not 0 <= each <= len(gpus):
        raise UserError(f"gpus={each}: a job can have 0 to {len(gpus)} of this machine's GPUs")
    if most is not None:
        check_int("max-parallel", most, least=1)
    if each == 0:
        count = most or 1
        return (Slot(threads=max(1, threads // count)),) * count
    parts = [tuple(gpus[n : n + each]) for n in range(0, len(gpus) - each + 1, each)]
    return tuple(map(Slot, parts[:most]))


def find_gpus() -> list[str]:
    """UUIDs of the GPUs this process may use; asked of another, which takes no memory on them."""
    listing = subprocess.run(
        [sys.executable, "-c", _LIST_GPUS], capture_output=True, text=True, check=False
    )
    return listing.stdout.split()


def find_submitit() -> Any:
    """The module submitit.

    Raises
    ------
    UserError
        If it, or Slurm, is not here.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "executor=slurm needs submitit: pip install 'sparsemm-eval[slurm]'"
        ) from error
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "executor=slurm: there is no sbatch here; run it on a machine of the cluster, or "
            "choose --executor local"
        )
    return submitit
