"""The device that is measured, and files of earlier runs that are gone on with."""

import json
from pathlib import Path

import pytest
import torch

from sparsemm_eval.bench.machine import device_name, find_device, provenance_on, read_earlier
from sparsemm_eval.errors import UserError

NOW = {"schema": 1, "code": "a", "versions": {"torch": "2"}, "hardware": {"name": "x"}}


@pytest.mark.parametrize("gpus", [0, 2])
def test_devices_are_those_that_are_there(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_name() == ("cuda" if gpus else "cpu")
    assert device_name("cpu") == "cpu"
    assert device_name("auto", "auto") == "auto"
    assert find_device() == torch.device("cuda" if gpus else "cpu")
    for name in ("tpu", "auto", "cuda:2", "cuda:0" if not gpus else "cuda:-1"):
        with pytest.raises(UserError, match=f"device='{name}': it must be one of"):
            device_name(name)
    assert device_name(rank=1) == ("cuda:1" if gpus else "cpu")
    if gpus:
        assert device_name("cuda:1") == "cuda:1"
    # A benchmark measures the current GPU.
    with pytest.raises(UserError, match="device='cuda:0'"):
        find_device("cuda:0")


def test_provenance_names_the_device() -> None:
    made = provenance_on(torch.device("cpu"), "a command")
    assert made["command"] == "a command"
    assert {"machine", "cpu_cores", "name", "kind", "threads", "cache_bytes"} == set(
        made["hardware"]
    )


@pytest.mark.parametrize(
    ("written", "alike", "read"),
    [
        (NOW, ("hardware",), True),
        (NOW | {"code": "b"}, (), False),
        (NOW | {"versions": {"torch": "3"}}, (), False),
        (NOW | {"hardware": {"name": "y"}}, (), True),
        (NOW | {"hardware": {"name": "y"}}, ("hardware",), False),
        ({}, (), False),
    ],
)
def test_an_earlier_run_is_read_if_it_is_as_if_measured_now(
    written: dict, alike: tuple[str, ...], read: bool, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    assert read_earlier(path, NOW, *alike) is None, "there is none"
    path.write_text(json.dumps(written))
    assert read_earlier(path, NOW, *alike) == (written if read else None)
    path.write_text('{"schema": 1')
    assert read_earlier(path, NOW, *alike) is None, "cut off"
