"""python -m flash_attn_ext info | verify | explain | demo | bench"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import _C, __version__
from .explain import Explanation, explain
from .ops import CUDA_LIBRARY, LIBRARY, cuda_library_status
from .verify import checks, cuda_ops_loaded


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_ext", description="Exact attention: FlashAttention ops."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help="what is installed, what it runs on, and what is missing and why")
    info.add_argument("--cmake", action="store_true", help="only the CMAKE_PREFIX_PATH for C++ programs")
    commands.add_parser("verify", help="checks outputs and gradients on every device of this machine")
    _add_explain(commands.add_parser("explain", help="which backend and kernel a call takes, and why"))
    commands.add_parser("demo", help="parity, memory, a GPT trained, a pretrained model", add_help=False)
    commands.add_parser("bench", help="speed, memory and error beside others (from the source tree)", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        from .demo.run import main as demo

        return demo(rest)
    if options.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return {"info": _info, "verify": _verify, "explain": _explain}[options.command](options)


def _info(options: argparse.Namespace) -> int:
    if options.cmake:
        print(LIBRARY.parent, torch.utils.cmake_prefix_path, sep=";")
        return 0
    for name, value in _facts():
        print(f"{name:20} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    build = _C.build_info()
    yield "flash_attn_ext", f"{__version__} in {LIBRARY.parent}"
    yield "Python, torch", f"{platform.python_version()}, {torch.__version__}"
    yield "built by", f"{build['compiler']}, with the headers of torch {build['torch_headers']}"
    yield LIBRARY.name, "loaded"
    yield CUDA_LIBRARY.name, cuda_library_status
    if build["cuda_version"]:
        yield "built for CUDA", f"{build['cuda_version']}, architectures {build['cuda_architectures']}"

    levels = [level for level in build["cpu_levels_available"] if level != "amx_emulated"]
    level = f"{build['cpu_level']} of {', '.join(levels)}"
    yield "CPU", f"{platform.machine()}, {torch.get_num_threads()} threads, instruction-set level {level}"
    if cap := os.environ.get("FAE_CPU_LEVEL"):
        yield "", f"FAE_CPU_LEVEL={cap} caps the level"
    for other in build["cpu_levels_compiled"]:
        if other not in build["cpu_levels_available"]:
            yield "", f"{other} is built in, but this CPU lacks its instructions"
    if torch.version.cuda is None:
        yield "CUDA devices", f"none: torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        yield "CUDA devices", "none: torch finds no device or no driver"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    try:
        limit = _C.backends()
        yield "backends", f"only {', '.join(limit)} (FAE_BACKENDS)" if limit else "all that are loaded"
    except ValueError as error:  # a wrong FAE_BACKENDS
        yield "backends", str(error)


def _verify(_: argparse.Namespace) -> int:
    results = []
    for check in checks():
        print(check, flush=True)
        results.append(check.passed)
    if not cuda_ops_loaded():
        print(f"no CUDA device was checked: {CUDA_LIBRARY.name} is {cuda_library_status}")
    elif not torch.cuda.is_available():
        print("no CUDA device was checked: torch finds none")
    failed = results.count(False)
    print(f"{failed} of {len(results)} checks FAILED" if failed else f"all {len(results)} checks passed")
    return 1 if failed else 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    sizes = {"batch": 1, "seqlen-q": 2048, "seqlen-k": None, "heads": 16, "heads-kv": None, "head-dim": 128}
    for name, default in {**sizes, "head-dim-v": None}.items():
        beside = "" if default else f" (default: {name.rpartition('-')[0].replace('seqlen', 'seqlen-q')})"
        parser.add_argument(f"--{name}", type=_size, default=default, metavar="N", help=beside)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"))
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    for flag in ("causal", "bias", "mask", "alibi", "sinks"):
        parser.add_argument(f"--{flag}", action="store_true")


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def _explain(options: argparse.Namespace) -> int:
    try:
        explanation = _explanation(options)
    except ValueError as error:  # InputError, or a wrong FAE_BACKENDS
        print(error, file=sys.stderr)
        return 2
    print(explanation)
    return 0 if explanation.backend else 1


def _explanation(options: argparse.Namespace) -> Explanation:
    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = getattr(torch, options.dtype)
    seqlen_k = options.seqlen_q if options.seqlen_k is None else options.seqlen_k
    heads_kv = options.heads if options.heads_kv is None else options.heads_kv
    head_dim_v = options.head_dim if options.head_dim_v is None else options.head_dim_v
    return explain(
        tensor(options.batch, options.seqlen_q, options.heads, options.head_dim, dtype=dtype),
        tensor(options.batch, seqlen_k, heads_kv, options.head_dim, dtype=dtype),
        tensor(options.batch, seqlen_k, heads_kv, head_dim_v, dtype=dtype),
        causal=options.causal,
        window_size=tuple(options.window),
        softcap=options.softcap,
        dropout_p=options.dropout,
        bias=tensor(options.seqlen_q, seqlen_k, dtype=dtype) if options.bias else None,
        mask=tensor(options.seqlen_q, seqlen_k, dtype=torch.bool) if options.mask else None,
        alibi_slopes=tensor(options.heads) if options.alibi else None,
        sinks=tensor(options.heads) if options.sinks else None,
        device=options.device,
    )


def _bench(arguments: list[str]) -> int:
    script = Path(__file__).parents[1] / "benchmarks" / "run.py"
    if not script.exists():
        print(
            f"The benchmark is part of the source tree, and {script} does not exist: run it from a clone",
            file=sys.stderr,
        )
        return 2
    return subprocess.call([sys.executable, str(script), *arguments])


if __name__ == "__main__":
    sys.exit(main())
