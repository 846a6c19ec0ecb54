"""What measurements say: tables, and aims that are told met or missed."""

from sparsemm_eval.bench.pages import (
    efficiency_aims,
    efficiency_table,
    kernels_aims,
    kernels_notes,
    kernels_table,
)


def record(entry: str, us: float | None, **about: object) -> dict:
    case = {"shape": "vicuna", "mean": 256, "distribution": "heavy", "rows": 1, "dtype": "float32"}
    return {**case, "entry": entry, "median_us": us, "bytes": 1000, **about}


def row(model: str, ms: float | None, **more: object) -> dict:
    plain = {"model": model, "method": "sparsemm", "budget": 256, "input_tokens": 32768,
             "engine": None, "rows": 1, "decode_ms_per_token": ms}  # fmt: skip
    return {**plain, **more}


def test_aims_of_kernels_are_told_met_or_missed() -> None:
    ours = record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0)
    padded = record("padded_sdpa", 40.0, ratio_to_cuda_ext=4.0)
    copied = record("concatenate", 40.0, ratio_to_cuda_ext=4.0)
    slow = record("concatenate", 9.0, ratio_to_cuda_ext=0.9, rows=4)
    bound = record("bound", 1.0, ratio_to_cuda_ext=0.1)
    three, five, ahead = kernels_aims([ours, padded, copied, slow, bound], "cpu")
    assert three.endswith("reached: 4; met")
    assert five.endswith("reached: 0.9 to 4; MISSED in 2 of 2 cases")
    assert ahead.endswith("reached: 0.9 to 4; MISSED in 1 of 2 cases")


def test_aims_of_kernels_on_a_gpu() -> None:
    graph = {"captured": True, "ratio_to_cuda_ext": 1.0}
    records = [
        record("cuda_ext", 5.0, share_of_bound=0.1, **graph),
        record("cuda_ext", 100.0, share_of_bound=0.6, **graph, rows=4),  # not of one row
        record("cuda_ext", 100.0, share_of_bound=0.75, **graph, mean=4096),
    ]
    share, small, ahead = kernels_aims(records, "cuda")
    assert share.endswith("reached: 0.75; met")
    assert small.endswith("reached: 5; met")
    assert ahead.endswith("not measured")


def test_aims_not_measured_are_not_met() -> None:
    assert all(
        line.endswith("not measured") for line in kernels_aims([], "cpu") + kernels_aims([], "cuda")
    )


def test_the_table_leaves_out_what_was_never_timed() -> None:
    rows = [
        record("bound", 1.0, ratio_to_cuda_ext=0.1),
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1),
        record("torch", 123.4, ratio_to_cuda_ext=12.34, share_of_bound=0.01),
        record("varlen", None, note="CUDA only", ratio_to_cuda_ext=None),
    ]
    head, _, row = kernels_table(rows).splitlines()
    assert "varlen" not in head
    assert row == "| vicuna | float32 | heavy | 1 | 256 | 10.0 | 123 | 1.0 | 10% | 12.3 |"


def test_disturbed_cases_are_marked() -> None:
    records = [
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1, disturbed=True),
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1, rows=4),
    ]
    _, _, marked, calm = kernels_table(records).splitlines()
    assert "| 1 | 256* |" in marked
    assert "| 4 | 256 |" in calm
    assert "(1 case)" in kernels_notes(records)[0]


def test_aims_of_a_gpu_are_told_met_or_missed() -> None:
    vicuna = "LLaVA-NeXT-Vicuna-7B"
    full = {"method": "fullkv", "budget": None}
    rows = [
        row(vicuna, 4.0, peak_memory_gb=16.5, compress_seconds=0.01, prefill_seconds=1.0),
        row(vicuna, 18.0, **full, engine="hf_generate"),
        row(vicuna, 7.0, **full),
        row("Qwen2-VL-7B-Instruct", 5.0),
    ]
    many = [row(vicuna, 5.0, rows=31, input_tokens=2048, share_of_bound=0.7)]
    lines = efficiency_aims({"hardware": {"kind": "cuda"}, "rows": rows, "many_rows": many})
    reached = {line.split(";")[0].removeprefix("aim: "): line for line in lines}
    assert len(reached) == 8
    assert reached[f"{vicuna}, 32K, sparsemm 256: at most 4.15 ms a token"].endswith("4; met")
    assert "5; MISSED" in reached["Qwen2-VL-7B-Instruct, 32K, sparsemm 256: at most 4.4 ms a token"]
    assert any("Mistral" in line and line.endswith("not measured") for line in lines)
    assert any("HF generate" in line and line.endswith("4.5; met") for line in lines)
    assert any("our engine" in line and line.endswith("1.75; MISSED") for line in lines)
    assert any("15.9 GiB" in line and line.endswith("16.5; MISSED") for line in lines)
    assert any("0.02 of the prefill" in line and line.endswith("0.01; met") for line in lines)
    assert any("31 rows" in line and line.endswith("1.43; MISSED") for line in lines)


def test_the_table_stands_beside_the_paper() -> None:
    text = efficiency_table(
        [row("LLaVA-NeXT-Vicuna-7B", 4.0), row("LLaVA-NeXT-Vicuna-7B", None, rows=31)]
    )
    single, many = text.splitlines()[2:]
    assert "| 4.00 |  |  |  | 37.9 |  | 17.4 |" in single
    assert "37.9" not in many
