"""Where a sweep's jobs are to run, as it is given on the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep.queue import Slot, find_gpus, make_slots
from sparsemm_eval.sweep.sbatch import Options
from sparsemm_eval.sweep.slurm import find_submitit


@dataclass(frozen=True)
class Room:
    """Where jobs are to run, and how many at once.

    Parameters
    ----------
    executor : {"local", "slurm"}
        This machine, or a cluster.
    gpus : int, optional
        Of each job; default 1, on a machine without GPUs none.
    max_parallel : int, optional
        Jobs that run at once, at most; default what the GPUs allow, on a CPU one.
    time, partition, account, qos, setup, sbatch
        Slurm's alone, see `Options`.
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

    def slots(self) -> tuple[Slot, ...]:
        """Of this machine.

        Raises
        ------
        ValueError
            For more than it has, or for what is Slurm's.
        """
        for name in ("time", "partition", "account", "qos", "setup", "sbatch"):
            if getattr(self, name):
                raise UserError(f"{name}: it is Slurm's, and executor is local; leave it out")
        return make_slots(find_gpus(), self.gpus, self.max_parallel, torch.get_num_threads())

    def options(self) -> Options:
        """For Slurm.

        Raises
        ------
        ValueError
            For what cannot be, and where there is no Slurm.
        """
        find_submitit()
        if self.time is None:
            raise UserError(
                "time is missing: give a job's limit in minutes, HH:MM:SS or D-HH:MM:SS; a job "
                "that reaches it is requeued and goes on"
            )
        options = Options(
            self.time, 1 if self.gpus is None else self.gpus, self.partition, self.account,
            self.qos, self.max_parallel, self.setup, self.sbatch,
        )  # fmt: skip
        options.check()
        return options
