"""What a task needs beyond Python, found before anything is computed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable

from sparsemm_eval.errors import UserError

# Tasks of lmms-eval whose metrics tokenize with a java program; without it lmms-eval fails after
# generation, and the scores of all other tasks of the run are lost.
_NEEDS_JAVA = re.compile(
    r"coco2014_cap_val|coco2017_cap_val(_lite)?|coco_karpathy_(test|val)"
    r"|flickr30k_test(_lite)?|nocaps_val(_lite)?|refcoco(\+|g)?_(bbox|seg)_(?!rec).+"
    r"|screenspot_reg_test|textcaps_(train|val|val_lite)|vatex_(test|val_zh)"
)


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks whose metrics cannot run here.

    Parameters
    ----------
    tasks : iterable of str
        Names of lmms-eval tasks; groups are not resolved.

    Raises
    ------
    ValueError
        If one needs java and there is none.
    """
    needy = sorted({task for task in tasks if _NEEDS_JAVA.fullmatch(task)})
    if needy and shutil.which("java") is None:
        verb, it = ("needs", "it") if len(needy) == 1 else ("need", "them")
        raise UserError(
            f"{', '.join(needy)} {verb} java for the metrics, and there is none: install a Java "
            f"runtime (Debian: apt install default-jre-headless) or leave {it} out"
        )
