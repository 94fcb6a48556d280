"""What is measured: attention calls as data, grouped in suites. A new case or suite is one entry here."""

import random
from dataclasses import dataclass, replace

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One self- or cross-attention call; every candidate computes exactly this function of the same numbers.

    ``causal`` lets query i see keys j <= i + seqlen_k - seqlen_q; ``window`` further limits it to the last ``window``
    keys before its own (so ``window + 1`` keys with its own).
    ``lengths`` are those of packed sequences; then batch is their number and seqlen_q = seqlen_k the longest.
    ``alibi``: with slopes of ALiBi; ``sinks``: with a sink in every head; ``dropout``: its probability.
    ``bias`` is an additive one with a gradient, its own for every head, and for every member of the batch ("batch") or
    the same for all ("heads"). ``mask`` is a boolean one, its own for every member of the batch.
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
    lengths: tuple[int, ...] = ()
    pattern: str = ""  # a word for ``lengths``
    bias: str = ""
    mask: bool = False
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout: float = 0.0

    @property
    def shape(self) -> str:
        if self.lengths:
            return f"{self.pattern} N{self.batch} T{sum(self.lengths)} H{self.heads} D{self.head_dim}"
        lengths = f"S{self.seqlen_k}" if self.seqlen_q == self.seqlen_k else f"Sq{self.seqlen_q} Sk{self.seqlen_k}"
        return f"B{self.batch} H{self.heads} {lengths} D{self.head_dim}"

    @property
    def variant(self) -> str:
        words = ["causal" if self.causal else "full"]
        if self.window is not None:
            words.append(f"window {self.window}")
        if self.heads_kv != self.heads:
            words.append(f"GQA {self.heads // self.heads_kv}")
        if self.bias:
            words.append(f"bias ({'1' if self.bias == 'heads' else 'B'},H,S,S)")
        if self.mask:
            words.append("mask (B,1,S,S)")
        if self.softcap:
            words.append(f"softcap {self.softcap:g}")
        if self.alibi:
            words.append("ALiBi")
        if self.sinks:
            words.append("sinks")
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        return ", ".join(words)

    @property
    def name(self) -> str:
        return f"{self.shape} {self.variant}"

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that count, for one head of the whole batch.

        A boolean mask hides pairs in no order that a kernel could skip: they count.
        """
        if self.lengths:
            return sum(self._pairs(length, length) for length in self.lengths)
        return self.batch * self._pairs(self.seqlen_q, self.seqlen_k)

    def _pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        if not self.causal:
            return seqlen_q * seqlen_k
        last = [i + seqlen_k - seqlen_q for i in range(seqlen_q)]
        first = [0 if self.window is None else max(0, j - self.window) for j in last]
        return sum(max(0, j - i + 1) for i, j in zip(first, last, strict=True))

    def flops(self, direction: str) -> float:
        """Forward: two matrix products over the visible pairs. Backward: five, one of them recomputing the scores."""
        forward = 4.0 * self.heads * self.visible_pairs() * self.head_dim
        return forward * (1.0 if direction == "forward" else 2.5)


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    directions: tuple[str, ...] = DIRECTIONS
    dtypes: tuple[str, ...] = ("bfloat16",)  # those that are measured where none are asked for
    measures_memory: bool = False  # peak memory of forward + backward instead of time
    limit_mib: float | None = None  # instead, the longest sequence whose forward + backward stays within this


def self_attention(heads: int, seqlen: int, head_dim: int, batch: int = 1) -> Case:
    return Case(batch, heads, seqlen, seqlen, head_dim, heads_kv=heads)


def variants(case: Case) -> tuple[Case, ...]:
    return (
        case,
        replace(case, causal=True),
        replace(case, causal=True, window=256),
        replace(case, heads_kv=case.heads // 4),
    )


def one_token(heads: int, seqlen_k: int, head_dim: int) -> Case:
    return Case(1, heads, 1, seqlen_k, head_dim, heads_kv=heads)


CPU_DTYPES = ("float32", "bfloat16")
CPU_SUITES = {
    "attention": Suite(
        variants(self_attention(12, 512, 64))
        + variants(self_attention(12, 2048, 64))
        + variants(self_attention(8, 4096, 128)),
        dtypes=CPU_DTYPES,
    ),
    "one_token": Suite(
        tuple(one_token(*shape) for shape in ((12, 2048, 64), (12, 4096, 64), (8, 2048, 128), (8, 4096, 128))),
        directions=("forward",),
        dtypes=CPU_DTYPES,
    ),
    "memory": Suite(
        tuple(self_attention(2, seqlen, 64) for seqlen in (1024, 2048, 4096, 8192, 16384)),
        dtypes=CPU_DTYPES,
        measures_memory=True,
    ),
    "longest": Suite((replace(self_attention(8, 1024, 64), causal=True),), dtypes=CPU_DTYPES, limit_mib=1024),
}


def tokens(total: int, width: int, seqlen: int, head_dim: int) -> Case:
    """As many sequences as make up ``total`` tokens, and as many heads as make up ``width`` numbers per token."""
    return self_attention(width // head_dim, seqlen, head_dim, batch=total // seqlen)


def full_and_causal(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(case, causal=causal) for case in cases for causal in (False, True))


def prefill(head_dims: tuple[int, ...], seqlens: tuple[int, ...]) -> tuple[Case, ...]:
    return full_and_causal(*(tokens(16384, 2048, seqlen, head_dim) for head_dim in head_dims for seqlen in seqlens))


def packed(pattern: str, lengths: tuple[int, ...]) -> Case:
    longest = max(lengths)
    return Case(len(lengths), 16, longest, longest, 128, heads_kv=16, lengths=lengths, pattern=pattern)


def long_tail(total: int) -> tuple[int, ...]:
    """Log-normal lengths, as of documents: most are short, a few hold most of the tokens."""
    draw, lengths = random.Random(0), list[int]()
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(16, min(8192, round(draw.lognormvariate(5.5, 1.2))))))
    return tuple(lengths)


def biased(case: Case) -> tuple[Case, ...]:
    return replace(case, bias="heads"), replace(case, bias="batch"), replace(case, mask=True)


def with_options(case: Case) -> tuple[Case, ...]:
    """The plain case first."""
    options = ({}, {"softcap": 30.0}, {"alibi": True}, {"sinks": True}, {"dropout": 0.1})
    return tuple(replace(case, **option) for option in options)


GPU_SUITES = {
    "prefill": Suite(prefill((128, 64, 256), (512, 1024, 2048, 4096, 8192, 16384))),
    "prefill_fp16": Suite(prefill((128, 64), (4096,)), dtypes=("float16",)),
    "gqa": Suite(
        full_and_causal(*(replace(tokens(16384, 2048, seqlen, 128), heads_kv=2) for seqlen in (1024, 4096, 16384)))
    ),
    "window": Suite(
        tuple(
            replace(tokens(16384, 2048, seqlen, 128), causal=True, window=1024) for seqlen in (2048, 4096, 8192, 16384)
        )
    ),
    "varlen": Suite(
        full_and_causal(
            packed("uniform", (1024,) * 32),
            packed("long-tail", long_tail(32768)),
            packed("one-long", (16384, *(128,) * 128)),
        )
    ),
    "bias": Suite(
        tuple(
            case
            for head_dim in (128, 64)
            for seqlen in (1024, 2048, 4096)
            for case in biased(tokens(8192, 2048, seqlen, head_dim))
        )
    ),
    "options": Suite(
        tuple(case for plain in full_and_causal(tokens(16384, 2048, 4096, 128)) for case in with_options(plain))
    ),
    "fp32": Suite(
        full_and_causal(*(tokens(16384, 2048, seqlen, head_dim) for head_dim in (128, 64) for seqlen in (1024, 4096))),
        dtypes=("float32",),
    ),
    "short": Suite(
        full_and_causal(
            *(tokens(16384, 4096, seqlen, head_dim) for head_dim in (128, 64) for seqlen in (128, 256, 512))
        )
    ),
    "memory": Suite(
        tuple(self_attention(16, seqlen, 128) for seqlen in (1024, 2048, 4096, 8192, 16384, 32768)),
        measures_memory=True,
    ),
}
SUITES = {"cpu": CPU_SUITES, "cuda": GPU_SUITES}
