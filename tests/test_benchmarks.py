"""The benchmark compares like with like, keeps what it measured, and the documentation shows exactly that."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import candidates  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from suites import Case, Suite, variants  # noqa: E402

TINY = Case(batch=2, heads=4, seqlen_q=70, seqlen_k=70, head_dim=16, heads_kv=4)
CASES = (
    *variants(TINY),
    Case(1, 4, 33, 70, 16, heads_kv=2, causal=True),
    Case(1, 4, 33, 70, 16, heads_kv=4, causal=True, window=9),
    Case(1, 4, 1, 70, 16, heads_kv=4),
)


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_current(page: Path) -> None:
    text = page.read_text()
    assert tables.MARKED.search(text)
    assert tables.renewed(text) == text, "run `make tables`"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs_are_counted_right(case: Case) -> None:
    allowed = candidates.visible(case, "cpu")
    counted = case.seqlen_q * case.seqlen_k if allowed is None else int(allowed.sum())
    assert case.visible_pairs() == counted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_candidates_compute_the_same_function(name: str, case: Case) -> None:
    candidate, inputs = candidates.CANDIDATES[name], candidates.make_inputs(case, "cpu")
    found = measure.errors(candidate, candidate.prepare(case, inputs), measure.expected_results(case, inputs))
    # A wrong window or head mapping changes numbers of size 1; float32 rounding in 70-term sums is below 1e-5.
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < 1e-5


@pytest.fixture
def tiny_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {
        "attention": Suite(variants(TINY)),
        "one_token": Suite(CASES[-1:], directions=("forward",)),
        "memory": Suite((TINY,), measures_memory=True),
    }
    monkeypatch.setattr(run, "SUITES", suites)
    monkeypatch.setattr(measure, "BATCH_SECONDS", 0.001)
    monkeypatch.setattr(measure, "GEMM_SIZE", 64)


def run_tiny(output: Path, *options: str) -> dict[str, Any]:
    """The result files by suite, after a run with the options."""
    assert run.main(["--output", str(output), "--threads", "1", "--rounds", "3", *options]) == 0
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*/*.json")}


@pytest.mark.usefixtures("tiny_suites")
def test_run_writes_what_the_tables_show(tmp_path: Path) -> None:
    files = run_tiny(tmp_path, "--suite", "attention,one_token,memory", "--dtypes", "float32")
    assert {suite: len(content["records"]) for suite, content in files.items()} == {
        "attention": 4,
        "one_token": 1,
        "memory": 1,
    }
    for content in files.values():
        assert {"commit", "torch", "cpu", "cpu_level", "cores", "date"} <= set(content["environment"])
    record = files["attention"]["records"][0]
    for name in candidates.CANDIDATES:
        first, median, third = record["candidates"][name]["forward"]["ms"]
        assert 0 < first <= median <= third
    pages = {name: made(tmp_path) for name, made in tables.TABLES.items()}
    assert all(TINY.name in pages[name] for name in ("speed", "memory"))
    ratio = tables.ratio_to(record, ["sdpa_flash"], "forward")
    ours, theirs = (record["candidates"][name]["forward"]["gflops"] for name in ("flash_attn_ext", "sdpa_flash"))
    assert ratio == pytest.approx(ours / theirs)


@pytest.mark.usefixtures("tiny_suites")
def test_run_continues_and_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--suite", "attention", "--dtypes", "float32")
    assert run_tiny(tmp_path, *options, "--budget", "0") == {}
    part = run_tiny(tmp_path, *options, "--match", "causal")["attention"]["records"]
    whole = run_tiny(tmp_path, *options)["attention"]["records"]
    assert len(part) == 2
    assert whole[:2] == part
    assert len(whole) == 4
    monkeypatch.setenv("FAE_COMMIT", "another")
    anew = run_tiny(tmp_path, *options, "--match", "GQA")["attention"]
    assert anew["environment"]["commit"] == "another"
    assert len(anew["records"]) == 1


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--suite", "attention,nothing"])
    assert "no such suite: nothing; there are attention, one_token, memory" in capsys.readouterr().err
