"""What a sweep asks of Slurm, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsemm_eval.errors import UserError

# Seconds before the time limit at which Slurm announces it.
_NOTICE = 90
# srun, which submitit puts before the command, has not taken this over by itself since 22.05.
_SETUP = (
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
)  # fmt: skip
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class Options:
    """What is asked of Slurm.

    Parameters
    ----------
    time : str
        Limit of a job: minutes, or as Slurm writes it (HH:MM:SS, D-HH:MM, …).
    gpus : int
        Of each job; none for the job that scores.
    partition, account, qos : str, optional
        As for sbatch.
    max_parallel : int, optional
        Jobs that run at once, at most.
    setup : sequence of str
        Shell lines before each job.
    sbatch : sequence of str
        Other parameters of sbatch, as NAME=VALUE or NAME.
    """

    time: str
    gpus: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    max_parallel: int | None = None
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises
        ------
        ValueError
            Naming the option. Partitions, accounts and GPUs are Slurm's to know.
        """
        self.minutes()
        if self.gpus < 0:
            raise UserError(f"gpus={self.gpus}: it must be an integer of at least 0")
        if self.max_parallel is not None and self.max_parallel < 1:
            raise UserError(
                f"max-parallel={self.max_parallel}: it must be an integer of at least 1"
            )
        for given in self.sbatch:
            if not re.fullmatch(r"[a-z][\w-]*(=.*)?", given):
                raise UserError(
                    f"sbatch={given!r}: give sbatch's long options without dashes, such as "
                    "mem=64G or exclusive"
                )

    def minutes(self) -> int:
        """The time limit.

        Raises
        ------
        ValueError
            If it is none, or zero, which Slurm takes for no limit.
        """
        found = _TIME.fullmatch(self.time)
        if found is None:
            raise UserError(f"time={self.time!r}: give minutes, HH:MM:SS or D-HH:MM:SS")
        first, second, third = (int(found[name] or 0) for name in "abc")
        if found["d"] is not None:
            seconds = int(found["d"]) * 86_400 + first * 3600 + second * 60 + third
        elif found["c"] is not None:
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
        """As submitit's executor takes them."""
        minutes = self.minutes()
        given = {
            "job_name": name, "time": minutes, "nodes": 1, "ntasks_per_node": 1,
            "partition": self.partition, "account": self.account, "qos": self.qos,
            "gpus_per_node": self.gpus or None, "array_parallelism": self.max_parallel,
            "signal_delay_s": min(_NOTICE, minutes * 15), "stderr_to_stdout": True,
            "setup": [*_SETUP, *self.setup],
        }  # fmt: skip
        pairs = (word.partition("=") for word in self.sbatch)
        more = {name: value if equal else True for name, equal, value in pairs}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**chosen, "additional_parameters": more}
