"""The benchmark compares like with like, keeps what it measured, and the documentation shows exactly that."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import candidates  # noqa: E402
import longest  # noqa: E402
import measure  # noqa: E402
import package_candidates  # noqa: E402
import run  # noqa: E402
import stopwatch  # noqa: E402
import suites  # noqa: E402
import tables  # noqa: E402
from candidate import Candidate, make_inputs, visible  # noqa: E402
from suites import Case, Suite, biased, packed, variants, with_options  # noqa: E402

import flash_attn_ext  # noqa: E402

TINY = Case(batch=2, heads=4, seqlen_q=70, seqlen_k=70, head_dim=16, heads_kv=4)
CASES = (
    *variants(TINY),
    Case(1, 4, 33, 70, 16, heads_kv=2, causal=True),
    Case(1, 4, 33, 70, 16, heads_kv=4, causal=True, window=9),
    Case(1, 4, 1, 70, 16, heads_kv=4),
)
LENGTHS = replace(packed("mixed", (70, 1, 33)), heads=4, heads_kv=2, head_dim=16)
GPU_CASES = (*biased(TINY), LENGTHS, replace(LENGTHS, causal=True), *with_options(TINY)[1:])
USUAL = candidates.usual_candidates("cpu")


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


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rows_have_every_cell(page: Path) -> None:
    """What a candidate did not measure is no row, or a dash."""
    for _, _, content, _ in re.findall(r"(<!-- table (\w+) -->\n)(.*?)(<!-- end -->)", page.read_text(), re.DOTALL):
        for block in re.findall(r"(?:^\|.*\n)+", content, re.MULTILINE):
            assert len({row.count("|") for row in block.splitlines()}) == 1, block


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs_are_counted_right(case: Case) -> None:
    allowed = visible(case, "cpu")
    counted = case.seqlen_q * case.seqlen_k if allowed is None else int(allowed.sum())
    assert case.visible_pairs() == case.batch * counted


def test_operations_of_packed_sequences_add_up() -> None:
    case = replace(LENGTHS, causal=True)
    alone = [Case(1, 4, length, length, 16, heads_kv=2, causal=True) for length in LENGTHS.lengths]
    for direction in suites.DIRECTIONS:
        assert case.flops(direction) == sum(one.flops(direction) for one in alone)
    assert LENGTHS.flops("forward") == 4 * 4 * 16 * (70**2 + 1 + 33**2)


def test_gpu_suites_hold_what_their_names_say() -> None:
    all_cases = {name: suite.cases for name, suite in suites.GPU_SUITES.items()}
    for cases in all_cases.values():
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.seqlen_q == case.seqlen_k for case in cases)  # peers differ in the causal order of others
    for case in all_cases["prefill"]:
        assert (case.batch * case.seqlen_q, case.heads * case.head_dim) == (16384, 2048)
    assert {case.heads // case.heads_kv for case in all_cases["gqa"]} == {8}
    assert {case.window for case in all_cases["window"]} == {1024}
    for case in all_cases["varlen"]:
        assert (case.batch, max(case.lengths), sum(case.lengths)) == (len(case.lengths), case.seqlen_q, 32768)
    assert {(case.bias, case.mask) for case in all_cases["bias"]} == {("heads", False), ("batch", False), ("", True)}
    assert suites.GPU_SUITES["fp32"].dtypes == ("float32",)


def largest_error(candidate: Candidate, case: Case) -> float:
    inputs = make_inputs(case, "cpu")
    expected = accuracy.expected_results(case, inputs)
    found = accuracy.errors(candidate, case, candidate.prepare(case, inputs), expected)
    if case.dropout:  # everyone draws bits of their own: nothing is compared
        assert found == {"error": {}, "rms_error": {}}
        return 0.0
    for errors in found.values():
        assert set(errors) == {"out", "dq", "dk", "dv"} | ({"dbias"} if case.bias else set())
    assert max(found["rms_error"].values()) < TOLERANCE
    return max(found["error"].values())


# A wrong window or head mapping changes numbers of size 1; float32 rounding in 70-term sums is below 1e-5.
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", [*CASES, *GPU_CASES], ids=lambda case: case.name)
@pytest.mark.parametrize("name", USUAL)
def test_candidates_compute_the_same_function(name: str, case: Case) -> None:
    candidate = candidates.CANDIDATES[name]
    if why_not := candidate.why_not(case, "cpu"):
        pytest.skip(why_not)
    try:
        assert largest_error(candidate, case) < TOLERANCE
    except RuntimeError as error:
        if name == "sdpa_flash" and "No available kernel" in str(error):
            pytest.skip("no kernel of torch's")  # with a gradient of the bias
        raise


@pytest.mark.filterwarnings("ignore")  # that it is slow without a compiler
@pytest.mark.parametrize("case", [*variants(TINY), *GPU_CASES], ids=lambda case: case.name)
def test_flex_attention_computes_the_same_function(case: Case) -> None:
    flex, inputs = candidates.CANDIDATES["flex_attention"], make_inputs(case, "cpu")
    if case.sinks or case.dropout:
        assert flex.why_not(case, "cuda") == f"takes no {'sinks' if case.sinks else 'dropout'}"
        return
    expected = accuracy.expected_results(case, inputs)[0]
    q, k, v = (flex.to_native(x, bool(case.lengths)) for x in (inputs.q, inputs.k, inputs.v))
    attend = flex.attention(case, inputs)  # without a gradient, which it lacks on a CPU
    out = flex.from_native(attend(q, k, v, *([inputs.bias] if case.bias else [])), bool(case.lengths))
    assert (out[: expected.shape[0], :, : expected.shape[2]] - expected).abs().max() < TOLERANCE


def test_the_reference_in_pieces_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (*CASES, biased(TINY)[0]):
        inputs = make_inputs(case, "cpu")
        whole = accuracy.expected_results(case, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(accuracy, "MOST_SCORES", 2000)
            pieces = accuracy.expected_results(case, inputs)
        torch.testing.assert_close(pieces, whole)


class Double(Candidate):
    """Wrong by a factor."""

    name = "double"
    takes = frozenset({"dense"})

    def attention(self, case: Case, inputs: Any) -> Any:
        return lambda q, k, v: 2 * flash_attn_ext.attention(q, k, v)


def test_wrong_results_are_refused() -> None:
    with pytest.raises(accuracy.WrongResultError, match="out is off by"):
        largest_error(Double(), TINY)


@pytest.fixture
def flash_attention_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Stands for FlashAttention 2 and 4, and 3 in a folder: the same calls, with our functions behind them."""
    for name in ("flash_attn", "flash_attn.cute"):
        module = ModuleType(name)
        for function in ("flash_attn_func", "flash_attn_varlen_func"):
            setattr(module, function, getattr(flash_attn_ext, function))
        monkeypatch.setitem(sys.modules, name, module)
    functions = "flash_attn_func(*args, **kw):\n    return f.flash_attn_func(*args, **kw), None\n"
    (tmp_path / "some_fa3.py").write_text(f"import flash_attn_ext as f\n\n\ndef {functions}")
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = list(package_candidates.FA3)
    package_candidates.take_fa3_from(tmp_path)
    yield
    package_candidates.FA3[:] = known
    sys.modules.pop("some_fa3", None)
    package_candidates.found.cache_clear()


@pytest.mark.usefixtures("flash_attention_packages")
@pytest.mark.parametrize("name", ["fa2", "fa2_deterministic", "fa3", "fa4"])
@pytest.mark.parametrize("case", [*variants(TINY), *GPU_CASES], ids=lambda case: case.name)
def test_packages_are_called_right(name: str, case: Case) -> None:
    candidate = candidates.CANDIDATES[name]
    why_not = candidate.why_not(case, "cpu")
    if name == "fa3" and case.lengths:
        assert why_not.endswith("some_fa3 has no flash_attn_varlen_func")
    elif foreign := [word for word in ("bias", "mask", "alibi", "sinks", "dropout") if getattr(case, word)]:
        assert why_not == f"takes no {'boolean ' * case.mask}{foreign[0]}"
    else:
        assert not why_not
        assert largest_error(candidate, case) < TOLERANCE


def test_gpu_calls_are_timed_in_their_own_steady_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that takes 2 ms a call and 5 ms for the first one of another kernel."""
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.time - self.time)

    def call() -> None:
        clock[0] += 0.002 if calls else 0.005
        calls.append(clock[0])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch(call, "cuda")
    calls.clear()
    watch.sample()
    assert watch.median() == pytest.approx(0.002)
    assert len(calls) * 0.002 == pytest.approx(stopwatch.WARM_SECONDS + stopwatch.BATCH_SECONDS, abs=0.004)


def test_usual_candidates_follow_the_device() -> None:
    assert USUAL == ["flash_attn_ext", "sdpa_flash", "sdpa_math", "softmax"]
    assert candidates.usual_candidates("cuda") == list(candidates.CANDIDATES)


@pytest.fixture
def tiny_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "attention": Suite(variants(TINY)),
        "one_token": Suite(CASES[-1:], directions=("forward",)),
        "prefill": Suite((TINY,), dtypes=("float32",)),
        "bias": Suite(biased(TINY), dtypes=("float32",)),
        "varlen": Suite((LENGTHS,), dtypes=("float32",)),
        "options": Suite(with_options(TINY), dtypes=("float32",)),
        "memory": Suite((TINY,), measures_memory=True),
    }
    monkeypatch.setattr(run, "SUITES", {"cpu": tiny, "cuda": {}})
    monkeypatch.setattr(stopwatch, "BATCH_SECONDS", 0.001)
    monkeypatch.setitem(measure.GEMM_SIZE, "cpu", 64)


def run_tiny(output: Path, *options: str) -> dict[str, Any]:
    """The result files by suite, after a run with the options."""
    common = ["--device", "cpu", "--output", str(output), "--threads", "1", "--rounds", "3"]
    assert run.main([*common, *options]) == 0
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
    for name in USUAL:
        first, median, third = record["candidates"][name]["forward"]["ms"]
        assert 0 < first <= median <= third
    pages = {name: made(tmp_path) for name, made in tables.TABLES.items()}
    assert all(TINY.name in pages[name] for name in ("speed", "memory"))
    ratio = tables.ratio_to(record, ["sdpa_flash"], "forward")
    ours, theirs = (record["candidates"][name]["forward"]["gflops"] for name in ("flash_attn_ext", "sdpa_flash"))
    assert ratio == pytest.approx(ours / theirs)


@pytest.mark.usefixtures("tiny_suites")
def test_options_are_compared_with_our_own_speed_without(tmp_path: Path) -> None:
    files = run_tiny(tmp_path, "--suite", "options", "--candidates", "flash_attn_ext,sdpa_math")
    records = files["options"]["records"]
    assert [record["candidates"]["sdpa_math"].get("unsupported", "") for record in records] == [
        "",
        "takes no softcap",
        "takes no alibi",
        "takes no sinks",
        "",
    ]
    for record, gflops in zip(records, (60.0, 40.0, 30.0, 20.0, 10.0), strict=True):
        for direction in suites.DIRECTIONS:
            record["candidates"]["flash_attn_ext"][direction]["gflops"] = gflops
    (path,) = tmp_path.glob("*/options.json")
    path.write_text(json.dumps(files["options"]))
    rows = tables.option_costs(tmp_path).splitlines()[-4:]
    costs = {"softcap 30": "1.50x", "ALiBi": "2.00x", "sinks": "3.00x", "dropout 0.1": "6.00x"}
    assert rows == [f"| {TINY.name}, {option} | {cost} | {cost} |" for option, cost in costs.items()]


@pytest.mark.usefixtures("tiny_suites", "flash_attention_packages")
def test_gpu_tables_and_plots_show_the_best_peer(tmp_path: Path) -> None:
    names = "flash_attn_ext,sdpa_cudnn,softmax,fa2,fa2_deterministic"
    files = run_tiny(tmp_path, "--suite", "prefill,memory", "--candidates", names)
    (record,) = files["prefill"]["records"]
    assert set(record["candidates"]["fa2_deterministic"]) == {"error", "rms_error", "backward"}
    assert "unsupported" in record["candidates"]["sdpa_cudnn"]
    for peer, gflops in {"softmax": 10e3, "fa2": 30e3, "fa2_deterministic": 20e3, "flash_attn_ext": 60e3}.items():
        for direction in suites.DIRECTIONS:
            record["candidates"][peer].setdefault(direction, {})["gflops"] = gflops
    del record["candidates"]["fa2_deterministic"]["forward"]
    (path,) = tmp_path.glob("*/prefill.json")
    path.write_text(json.dumps(files["prefill"]))
    cells = "60 | 30 FA2 | 2.00x"
    assert f"| float32 | {cells} | {cells} | 20 FA2 deterministic | 3.00x |" in tables.gpu_speed(tmp_path)
    peers = "softmax, FA2, FA2 deterministic"
    assert f"| prefill | float32 | 1 | {peers} | 2.00x | 2.00x | 2.00x | 2.00x | 3.00x | 3.00x |" in tables.gpu_speedup(
        tmp_path
    )
    assert "SDPA cuDNN" not in tables.gpu_error(tmp_path)
    assert re.search(r"\| prefill \| float32 \| 1 \|( \d\.\d{3} \(\d\.\d{3}\) \|){4}$", tables.gpu_rms_error(tmp_path))

    pytest.importorskip("matplotlib")
    import plot

    assert set(plot.COLOURS) == set(tables.TITLES) == set(candidates.CANDIDATES)
    plot.main(tmp_path, tmp_path / "plots")
    drawn = {f"docs/plots/{image.name}" for image in tmp_path.glob("plots/*.png")}
    links = tables.plots(tmp_path) + "\n\n" + tables.error_plots(tmp_path).replace("(plots", "(docs/plots")
    assert all(link.split("(")[-1].rstrip(")") in drawn for link in links.split("\n\n"))


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("tiny_suites")
def test_run_records_why_candidates_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(name for name in candidates.CANDIDATES if name != "sdpa_math")
    files = run_tiny(tmp_path, "--suite", "bias,varlen", "--candidates", names)
    (packed_record,) = files["varlen"]["records"]
    for record in (*files["bias"]["records"], packed_record):
        assert record["candidates"]["flash_attn_ext"]["backward"]["gflops"] > 0
        missing = [result["unsupported"] for result in record["candidates"].values() if "unsupported" in result]
        assert missing
        assert all(missing)
    assert packed_record["candidates"]["softmax"]["unsupported"] == "takes no packed sequences"
    assert "    softmax: takes no packed sequences\n" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_suites")
def test_a_lost_device_costs_one_candidate_of_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StartAgainError(Exception):
        pass

    def start_again(seconds: float) -> None:
        raise StartAgainError

    class Breaks(Double):
        name = "breaks"
        devices = ("cpu",)

        def attention(self, case: Case, inputs: Any) -> Any:
            raise RuntimeError("illegal memory access\nsecond line")

    options = ("--suite", "prefill", "--candidates", "flash_attn_ext,breaks")
    monkeypatch.setitem(candidates.CANDIDATES, "breaks", Breaks())
    with monkeypatch.context() as patch:
        patch.setattr(run, "start_again", start_again)
        patch.setattr(measure, "device_lost", lambda device: True)
        with pytest.raises(StartAgainError):
            run_tiny(tmp_path, *options)
    (content,) = run_tiny(tmp_path, *options).values()
    (record,) = content["records"]
    assert record["candidates"]["breaks"] == {"unsupported": "RuntimeError: illegal memory access"}
    assert record["candidates"]["flash_attn_ext"]["forward"]["gflops"] > 0
    assert not content["lost"]


def test_the_longest_sequence_is_found_and_run() -> None:
    """On candidates whose memory and time are known: linear with a constant, quadratic, slow, and with a step."""
    ran: list[int] = []

    def grows(mib: Any, seconds: float = 0.0) -> Any:
        def measured(seqlen: int) -> longest.Run:
            ran.append(seqlen)
            return longest.Run(seqlen, mib(seqlen), seconds * seqlen**2)

        return measured

    def search(*candidate: Any) -> tuple[int, str]:
        ran.clear()
        run, stopped = longest.search(grows(*candidate), 1000.0, most_seconds=100.0)
        assert run.seqlen in ran
        return run.seqlen, stopped

    assert search(lambda n: 5 + n / 64) == (57344, "memory")
    assert search(lambda n: n**2 / 1e4) == (3072, "memory")
    assert search(lambda n: n / 64, 1e-6) == (8192, "time")
    assert search(lambda n: n / 64 + 300 * (n > 48000)) == (40960, "memory")
    assert 65536 not in ran  # too large by what the run before had shown
    with pytest.raises(ValueError, match="limit_mib must be more than a sequence of 2048 takes"):
        search(lambda n: n)


@pytest.mark.usefixtures("tiny_suites")
def test_the_longest_sequences_are_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.SUITES["cpu"], "longest", Suite((replace(TINY, causal=True),), limit_mib=100.0))

    def run_in_fresh_process(name: str, case: Case, setup: Any, seqlen: int) -> longest.Run:
        return longest.Run(seqlen, seqlen / (32 if name == "softmax" else 64), 2.0)

    monkeypatch.setattr(longest, "run_in_fresh_process", run_in_fresh_process)
    files = run_tiny(tmp_path, "--suite", "longest", "--dtypes", "float32", "--candidates", "flash_attn_ext,softmax")
    (record,) = files["longest"]["records"]
    sizes = {"seqlen": 3072, "mib": 96.0, "seconds": 2.0}
    assert record["candidates"]["softmax"] == {**sizes, "limit_mib": 100.0, "stopped": "memory"}
    row = "| B2 H4 D16 causal | float32 | 1 | 6144 (96 MiB) | 3072 (96 MiB) |"
    assert row in tables.longest(tmp_path)
    record["candidates"]["softmax"]["stopped"] = "time"
    assert tables.longest_run(record["candidates"]["softmax"]) == "more than 3072 (96 MiB)"


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--suite", "attention,nothing"])
    assert "no such suite: nothing; there are attention, one_token, memory" in capsys.readouterr().err
