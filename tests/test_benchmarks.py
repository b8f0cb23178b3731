"""The results that are committed, and the tables made from them."""

import argparse
import importlib
import inspect
import json
from pathlib import Path

import pytest
import tables

RESULTS = sorted((Path(tables.__file__).parent / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    """Every result file names its machine, versions, commit and protocol, and holds rows."""
    result = json.loads(path.read_text())
    assert path.stem.startswith(result["subject"])
    assert {"gpu", "driver", "cpu_cores"} <= set(result["machine"])
    assert result["versions"]["torch"]
    assert len(result["commit"]) == 40
    assert result["protocol"]
    assert result["rows"]


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page: Path) -> None:
    """Every table in the documentation is the one that its result file gives."""
    assert page.read_text() == tables.rendered(page)


def test_every_job_of_the_reliability_count_takes_its_arguments() -> None:
    """No job that only a GPU can run waits for one to find out that its function wants other arguments."""
    count = importlib.import_module("device_loader_reliability")
    names = (
        "n_batches",
        "n_peer_batches",
        "n_epochs",
        "n_breaks",
        "n_faults",
        "n_kills",
        "n_exits",
        "limit_s",
    )
    options = argparse.Namespace(**dict.fromkeys(names, 1))
    jobs = [job for part in count.PARTS for job in count.jobs_of(part, options)]
    assert len(jobs) > len(count.PARTS)
    for _, function, arguments in jobs:
        inspect.signature(function).bind(print, **arguments)
