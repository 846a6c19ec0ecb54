"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine takes longer for an example, and that is no fault of what is tested.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny operations on busy cores: threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Minutes each: begun last, one of them would keep a whole run waiting for a single worker.
LONG = (
    "test_jobs.py", "test_slurm.py", "test_whole_runs.py", "test_demo.py", "test_run.py",
    "test_killed_sweep.py", "test_acceptance.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, and skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
