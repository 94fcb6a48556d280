"""What is measured: attention calls as data, grouped in suites. A new case or suite is one entry here."""

from dataclasses import dataclass, replace

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One self- or cross-attention call; every candidate computes exactly this function of the same numbers.

    ``causal`` lets query i see keys j <= i + seqlen_k - seqlen_q; ``window`` further limits it to the last ``window``
    keys before its own (so ``window + 1`` keys with its own).
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads_kv: int
    causal: bool = False
    window: int | None = None
    dtype: str = "float32"

    @property
    def shape(self) -> str:
        lengths = f"S{self.seqlen_k}" if self.seqlen_q == self.seqlen_k else f"Sq{self.seqlen_q} Sk{self.seqlen_k}"
        return f"B{self.batch} H{self.heads} {lengths} D{self.head_dim}"

    @property
    def variant(self) -> str:
        words = ["causal" if self.causal else "full"]
        if self.window is not None:
            words.append(f"window {self.window}")
        if self.heads_kv != self.heads:
            words.append(f"GQA {self.heads // self.heads_kv}")
        return ", ".join(words)

    @property
    def name(self) -> str:
        return f"{self.shape} {self.variant}"

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that count, for one head."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        last = [i + self.seqlen_k - self.seqlen_q for i in range(self.seqlen_q)]
        first = [0 if self.window is None else max(0, j - self.window) for j in last]
        return sum(max(0, j - i + 1) for i, j in zip(first, last, strict=True))

    def flops(self, direction: str) -> float:
        """Forward: two matrix products over the visible pairs. Backward: five, one of them recomputing the scores."""
        forward = 4.0 * self.batch * self.heads * self.visible_pairs() * self.head_dim
        return forward * (1.0 if direction == "forward" else 2.5)


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    directions: tuple[str, ...] = DIRECTIONS
    measures_memory: bool = False  # peak memory of forward + backward instead of time


def self_attention(heads: int, seqlen: int, head_dim: int) -> Case:
    return Case(1, heads, seqlen, seqlen, head_dim, heads_kv=heads)


def variants(case: Case) -> tuple[Case, ...]:
    return (
        case,
        replace(case, causal=True),
        replace(case, causal=True, window=256),
        replace(case, heads_kv=case.heads // 4),
    )


def one_token(heads: int, seqlen_k: int, head_dim: int) -> Case:
    return Case(1, heads, 1, seqlen_k, head_dim, heads_kv=heads)


SUITES = {
    "attention": Suite(
        variants(self_attention(12, 512, 64))
        + variants(self_attention(12, 2048, 64))
        + variants(self_attention(8, 4096, 128))
    ),
    "one_token": Suite(
        tuple(one_token(*shape) for shape in ((12, 2048, 64), (12, 4096, 64), (8, 2048, 128), (8, 4096, 128))),
        directions=("forward",),
    ),
    "memory": Suite(
        tuple(self_attention(2, seqlen, 64) for seqlen in (1024, 2048, 4096, 8192, 16384)), measures_memory=True
    ),
}
