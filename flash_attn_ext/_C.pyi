from typing import Any

# Hooks for tests into csrc/core; csrc/python/core.cpp lists them.
core: Any

def build_info() -> dict[str, Any]: ...
def set_cpu_level(name: str) -> None: ...
def backends() -> list[str]: ...
def set_backends(names: list[str]) -> None: ...
def explain(
    *,
    device: str,
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    packed: bool = False,
    seqused_q: bool = False,
    seqused_k: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softmax_scale: float = 1.0,
    softcap: float = 0.0,
    bias: bool = False,
    mask: bool = False,
    alibi_slopes: bool = False,
    sinks: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = True,
    backward: bool = False,
) -> list[dict[str, Any]]: ...
