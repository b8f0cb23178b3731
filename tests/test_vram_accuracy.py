"""The accuracy benchmark: its command line, its rows, its last line of JSON."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
JOB = {"source": "custom", "model": "mlp", "batch": 4, "size": 32, "optimizer": "adamw", "precision": "fp32"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the script as it imports itself: with its folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("vram_accuracy")


def run(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[dict[str, Any]], *options: str
) -> None:
    """Run the script on jobs whose measured memory is made up."""
    truth = {
        "gpu": "NVIDIA H200",
        "jobs": [
            {"id": job["id"], "peak_allocated": 2**20, "peak_reserved": 2**21, "process_used": 2**29}
            for job in jobs
        ],
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "truth.json").write_text(json.dumps(truth))
    files = ("--jobs", str(folder / "jobs.json"), "--truth", str(folder / "truth.json"))
    monkeypatch.setattr("sys.argv", ["vram_accuracy.py", *files, *options])
    script.main()


def test_last_line_is_the_promised_json(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row a job with signed errors, failures counted and named, and one line of JSON at the end."""
    jobs = [JOB | {"id": "small"}, JOB | {"id": "broken", "model": "nothing"}]
    monkeypatch.setenv("TORCHFAST_RESULTS", str(tmp_path))
    run(script, tmp_path, monkeypatch, jobs, "--json", str(tmp_path / "out.json"), "--record", "known")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("small ")
    assert "failed: ValueError: model 'nothing'" in lines[2]
    result = json.loads(lines[-1])
    assert list(result) == [
        "n",
        "failed",
        "safe_bound_under_pct",
        "safe_bound_over_median_pct",
        "seconds_median",
        "seconds_p95",
        "families",
    ]
    assert (result["n"], result["failed"]) == (2, 1)
    assert list(result["families"]) == ["dense", "conv"]
    assert list(result["families"]["dense"]) == [
        "n",
        *(
            f"{name}_{what}_pct"
            for name in ("allocated", "reserved", "process")
            for what in ("median", "p95")
        ),
    ]
    assert result["families"]["conv"]["allocated_median_pct"] is None
    assert json.loads((tmp_path / "out.json").read_text())["summary"] == result
    recorded = next(tmp_path.glob("vram_accuracy_known_*.json"))
    assert json.loads(recorded.read_text())["summary"] == result


def test_only_and_sample_choose_jobs(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--only` keeps ids with a text in them, `--sample` the same few of them every time."""
    jobs = [JOB | {"id": f"job-{i}", "model": "nothing"} for i in range(20)]
    run(script, tmp_path, monkeypatch, jobs, "--only", "job-1", "--sample", "3")
    first = capsys.readouterr().out
    run(script, tmp_path, monkeypatch, jobs, "--only", "job-1", "--sample", "3")
    assert first == capsys.readouterr().out
    assert json.loads(first.splitlines()[-1])["n"] == 3
    assert all(line.startswith("job-1") for line in first.splitlines()[1:-1])


def test_percentiles_are_those_of_numpy(script: Any) -> None:
    """Percentiles are interpolated linearly, as numpy does by default."""
    np = pytest.importorskip("numpy")
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for percent in (0, 50, 95, 100):
        assert math.isclose(script.percentile(values, percent), np.percentile(values, percent), abs_tol=1e-4)
    assert script.percentile([], 50) is None
