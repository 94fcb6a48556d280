"""The C++ API: header, CMake package and example programs, compiled here, against Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from flash_attn_ext import MultiheadAttention, attention, attention_varlen, merge, softmax

ROOT = Path(__file__).parent.parent
CXX = shutil.which(os.environ.get("CXX", "c++"))
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
needs_compiler = pytest.mark.skipif(not (CXX and CMAKE), reason="needs a C++ compiler and cmake")


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the built programs; half a minute of one core."""
    build = tmp_path_factory.mktemp("cpp")
    prefix = run(sys.executable, "-m", "flash_attn_ext", "info", "--cmake").strip()
    run(CMAKE, "-S", ROOT / "tests/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", build, "--parallel", 2)
    return build


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_header_and_package_are_those_of_the_sources() -> None:
    prefix = Path(run(sys.executable, "-m", "flash_attn_ext", "info", "--cmake").split(";")[0])
    header, config = "include/flash_attn_ext/flash_attn_ext.h", "flash_attn_extConfig.cmake"
    assert (prefix / header).read_text() == (ROOT / "csrc" / header).read_text()
    assert (prefix / "share/cmake/flash_attn_ext" / config).read_text() == (ROOT / "cmake" / config).read_text()


# ---- The functions --------------------------------------------------------------------------------------------------

NAMES = ("causal", "window_left", "window_right", "softmax_scale", "softcap", "bias", "mask", "alibi_slopes", "sinks")
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(NAMES),
    "causal": False,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "dropout_p": 0.0,
    **dict.fromkeys(("seqused_q", "seqused_k")),
}
USED = {"q": (7, 3), "k": (4, 9)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.2},
    "window and softcap": {"window_left": 3, "window_right": 1, "softcap": 2.0},
    "bias": {"bias": normal(4, 1, 9, seed=5)},
    "sinks": {"sinks": normal(4, seed=6), "causal": True},
    "bias and sinks": {"bias": normal(7, 9, seed=5), "sinks": normal(4, seed=6)},
    "mask and ALiBi": {"mask": normal(2, 1, 7, 9, seed=7) > -1, "alibi_slopes": torch.linspace(0.1, 0.4, 4)},
    "used lengths": {f"seqused_{side}": torch.tensor(x, dtype=torch.int32) for side, x in USED.items()},
}


def in_cpp(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Any, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.flash_attn_ext_cpp.attention(q, k, v, *starts, *(DEFAULTS | options).values())


def in_python(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Any, Any], **options: Any) -> tuple[Tensor, Tensor]:
    window = (options.pop("window_left", -1), options.pop("window_right", -1))
    if starts[0] is None:
        return attention(q, k, v, window_size=window, return_lse=True, **options)
    return attention_varlen(q, k, v, *starts, window_size=window, return_lse=True, **options)


@pytest.fixture
def _api(programs: Path) -> None:
    torch.ops.load_library(str(programs / "libapi.so"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_api")
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients_are_pythons(name: str, packed: bool, place: str) -> None:
    if packed and name in ("bias and sinks", "mask and ALiBi", "used lengths"):
        pytest.skip("their shapes are those of the dense case")

    def there(x: Any) -> Any:
        on_gpu = isinstance(x, Tensor) and place == "cuda"
        return x.to(place, torch.float32 if x.is_floating_point() else x.dtype) if on_gpu else x

    options = {n: there(x) for n, x in OPTIONS[name].items()}
    starts: tuple[Any, Any] = (None, None)
    tensors = [there(x) for x in (normal(2, 7, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 6, seed=2))]
    if packed:
        tensors = [x.flatten(0, 1) for x in tensors]
        starts = tuple(torch.tensor(x, dtype=torch.int32, device=place) for x in ((0, 5, 12), (0, 9, 16)))
    results = []
    for function in (in_cpp, in_python):
        leaves = {n: x.clone().requires_grad_() for n, x in options.items() if n in ("bias", "sinks")}
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out, lse = function(q, k, v, starts, **(options | leaves))
        loss = out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).cos().sum()
        results.append([out, lse, *torch.autograd.grad(loss, [q, k, v, *leaves.values()])])
    for cpp, python in zip(*results, strict=True):
        assert torch.equal(cpp, python)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_api")
def test_dropout_errors_and_second_derivatives() -> None:
    q = normal(2, 7, 4, 8).requires_grad_()
    torch.manual_seed(3)
    cpp, _ = in_cpp(q, q, q, (None, None), dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(cpp, attention(q, q, q, dropout_p=0.4))
    with pytest.raises(RuntimeError, match=r"2 constraints are not met\n- softcap must[^\n]*\n- k must"):
        in_cpp(q, q[..., :5], q, (None, None), softcap=-1.0)
    with pytest.raises(ValueError, match="window_size"):
        in_cpp(q, q, q, (None, None), window_left=-2)
    with pytest.raises(ValueError, match=r"\n- window_size must[^\n]*\n- alibi_slopes has no gradient"):
        in_cpp(q, q, q, (None, None), window_left=-2, alibi_slopes=torch.ones(4, requires_grad=True))
    sinks = normal(4, seed=1).requires_grad_()
    for given, leaf in ((q, q), (q.detach(), sinks)):
        out, lse = in_cpp(given, given, given, (None, None), sinks=sinks)
        (gradient,) = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no gradient of the gradient"):
            gradient.sum().backward()


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_api")
def test_autocast() -> None:
    tensors = [normal(2, 7, 4, 8, seed=seed).float() for seed in range(3)]
    for bias in (None, normal(7, 7, seed=4).float(), normal(7, 7, seed=4).half()):
        with torch.autocast("cpu", torch.bfloat16):
            (out, _), expected = in_cpp(*tensors, (None, None), bias=bias), attention(*tensors, bias=bias)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected)
    double = normal(2, 7, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_cpp(double, double, double, (None, None))[0].dtype == torch.float64


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_api")
@pytest.mark.parametrize("packed", [False, True])
def test_merge_and_softmax_are_pythons(packed: bool) -> None:
    tensors = [normal(2, 7, 4, 6), normal(2, 4, 7, seed=1), normal(2, 7, 4, 6, seed=2), normal(2, 4, 7, seed=3)]
    tensors[1][0, 0, :3] = -torch.inf  # rows that saw nothing there
    tensors = [x[0] for x in tensors] if packed else tensors
    for cpp, python in ((torch.ops.flash_attn_ext_cpp.merge, merge), (torch.ops.flash_attn_ext_cpp.softmax, softmax)):
        results, seconds = [], []
        for function in (cpp, python):
            leaves = [x.clone().requires_grad_() for x in (tensors if python is merge else tensors[:1])]
            found = function(*leaves)
            found = found if isinstance(found, tuple) else (found,)
            gradients = torch.autograd.grad(sum(x.sin().sum() for x in found), leaves, create_graph=True)
            results.append([*found, *gradients])
            seconds.append(gradients[0].sum())
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
        with pytest.raises(RuntimeError, match="no gradient of the gradient"):
            seconds[0].backward()
        seconds[1].backward()
    with pytest.raises(RuntimeError, match="lse_b must be float64 of shape"):
        torch.ops.flash_attn_ext_cpp.merge(*tensors[:3], tensors[3][..., :2])


# ---- The examples ---------------------------------------------------------------------------------------------------


def losses_in_python(text: bytes, steps: int, device: str) -> list[float]:
    """The model of examples/cpp/train.cpp."""
    dtype = torch.float32 if device == "cuda" else torch.float64
    width, heads, heads_kv, context, batch = 32, 4, 2, 64, 8
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    dim = width // heads
    shapes = {
        "embedding": ((256, width), 0.5),
        "position": ((context, width), 0.1),
        "query": ((width, heads * dim), 0.2),
        "key": ((width, heads_kv * dim), 0.2),
        "value": ((width, heads_kv * dim), 0.2),
        "output": ((heads * dim, width), 0.2),
        "sinks": ((heads,), 0.1),
        "head": ((width, 256), 0.2),
    }
    p = {}
    for name, (shape, scale) in shapes.items():
        p[name] = (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
    optimizer = torch.optim.Adam(p.values(), 1e-2)
    losses = []
    for _ in range(steps):
        rows = data[torch.randint(len(data) - context, (batch, 1)) + torch.arange(context + 1)].to(device)
        x = p["embedding"][rows[:, :-1]] + p["position"]
        q, k, v = ((x @ p[name]).unflatten(-1, (-1, dim)) for name in ("query", "key", "value"))
        attended = attention(q, k, v, causal=True, window_size=(24, -1), sinks=p["sinks"])
        logits = (x + attended.flatten(2) @ p["output"]) @ p["head"]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Adam amplifies the rounding of sums in another order, a little more with every step.
@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("place", "tolerance"), [("cpu", 1e-9), pytest.param("cuda", 1e-3, marks=gpu)])
def test_training_in_cpp_and_in_python(place: str, tolerance: float, programs: Path) -> None:
    text, steps = ROOT / "CONTRIBUTING.md", 60
    lines = run(programs / "examples/train", text, steps, place).splitlines()
    in_cpp = [float(line.split()[-1]) for line in lines]
    expected = losses_in_python(text.read_bytes(), steps, place)
    assert expected[-1] < 0.75 * expected[0]
    assert in_cpp == pytest.approx(expected, rel=tolerance)


class Exported(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 4))
        return self.layer(x, x, x, need_weights=False)[0] + attention(q, q, q, causal=True).flatten(2).sin()


PACKAGE_OF_TORCH_ALONE = """
import sys, torch
model, example = torch.nn.Linear(16, 16).to(sys.argv[1]), torch.randn(2, 16, device=sys.argv[1])
with torch.no_grad():
    program = torch.export.export(model, (example,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
    torch._inductor.aoti_load_package(package)(example)
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=gpu)])
def test_exported_model_runs_in_python_and_cpp(place: str, programs: Path, tmp_path: Path) -> None:
    """torch.export, compiled ahead of time, with sizes that it was not traced with; the program has no Python in it."""
    command = [sys.executable, "-c", PACKAGE_OF_TORCH_ALONE, place, str(tmp_path / "alone.pt2")]
    if status := subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"a package without our ops does not run here either: exit status {status}")
    torch.manual_seed(0)
    model, example = Exported().eval().to(place), torch.randn(2, 9, 16, device=place)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=(sizes,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for shape in ((2, 9, 16), (3, 40, 16)):
            x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(place)
            expected = model(x)
            torch.testing.assert_close(loaded(x), expected)
            found = float(run(programs / "examples/run_exported", package, place, *shape))
            assert found == pytest.approx(expected.double().sum().item(), rel=1e-4, abs=1e-4)
