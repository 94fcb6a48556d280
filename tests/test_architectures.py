"""Every architecture of transformers that asks for an attention function, its smallest model with ours against eager.

`python tests/test_architectures.py` runs all and writes the table in docs/transformers.md; the tests compare it: those
of the normal suite for the best-known models and for all that have overrides, the slow ones for all others.
"""

from __future__ import annotations

import copy
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

import transformers
from architecture_overrides import OVERRIDES
from architectures import NOT_REACHED, Architecture, architectures, one_line, smallest
from transformers import AttentionInterface, PreTrainedModel

from flash_attn_ext.integrations import transformers as fa_ext

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
BEGIN, END = "<!-- table architectures -->", "<!-- end -->"
# Both sides round differently, in float32, in every layer. Where a model magnifies that, three times the difference of
# torch's SDPA is allowed. A wrong mask element shows as 1e-2 and more.
TOLERANCE = 2e-5
LARGEST_TOLERANCE = 1e-3
# Where that is not enough either, the difference must vanish in float64.
LARGEST_IN_FLOAT64 = 1e-10

PARTS = 8  # of the others, for processes that run in parallel
KNOWN = (
    *("albert", "bart", "beit", "bert", "bert_generation", "biogpt", "blip_2", "camembert", "clap", "clip", "codegen"),
    *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v4", "deit", "dinov2", "dinov3_vit", "distilbert"),
    *(
        "electra",
        "esm",
        "gemma",
        "gemma2",
        "gemma3",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
    ),
    *("granite", "hubert", "llama", "llama4", "llava", "mbart", "mistral", "mixtral", "modernbert", "mt5", "nemotron"),
    *("olmo2", "olmoe", "opt", "paligemma", "pegasus", "persimmon", "phi", "phi3", "qwen2", "qwen2_5_vl", "qwen2_moe"),
    *("qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "roberta", "siglip", "smollm3", "stablelm", "starcoder2", "t5"),
    *("t5gemma", "umt5", "vit", "wav2vec2", "whisper", "xlm_roberta", "yolos"),
)


@dataclass(frozen=True)
class Finding:
    name: str
    model: str
    """The class that was built; empty if none runs with eager attention."""
    problem: str
    """Empty: outputs and all gradients are those of eager."""

    @property
    def counts(self) -> bool:
        """Whether eager attention can run here: not without attention, nor without a package that the model needs."""
        return bool(self.model) or not self.problem.startswith((NOT_REACHED, "ImportError"))


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs that are floating numbers, without attention weights and the rows of padding."""
    torch.manual_seed(0)  # some models draw noise
    result = model(**copy.deepcopy(inputs))  # a session of a video is changed
    result = {key: x for key, x in result.items() if "attentions" not in key} if isinstance(result, dict) else result
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
    padding = inputs.get("attention_mask")
    if padding is None:
        return outputs
    return [x[padding.bool()] if x.shape[:2] == padding.shape else x for x in outputs]


def reaches_attention(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    with patch.object(AttentionInterface, "get_interface", wraps=AttentionInterface().get_interface) as asked:
        with torch.no_grad():
            forward(model, inputs)
        return asked.called


def step(model: PreTrainedModel, implementation: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    outputs = forward(model, inputs)
    loss = torch.zeros(())
    for seed, x in enumerate(outputs):
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        loss = loss + (x * weights).sum()
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{f"output {i}": x.detach() for i, x in enumerate(outputs)}, **gradients}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and where it is."""
    if actual.keys() != expected.keys():
        return math.inf, ", ".join(sorted(actual.keys() ^ expected.keys())[:3])
    finite = {name: x.nan_to_num(posinf=0, neginf=0).abs() for name, x in expected.items() if x.numel()}
    scale = max((x.max() for x in finite.values()), default=torch.zeros(()))
    worst = (0.0, "")
    for name, x in finite.items():
        # A gradient that is zero but for rounding, like that of a bias of keys, is measured by the others.
        largest = max(x.max(), 1e-2 * scale)
        error = (actual[name] - expected[name]).abs().nan_to_num(nan=math.inf)
        error[(actual[name] == expected[name]) | (actual[name].isnan() & expected[name].isnan())] = 0
        if largest > 0:
            worst = max(worst, (float(error.max() / largest), name))
    return worst


def rounding(model: PreTrainedModel, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """What torch's SDPA differs by, where it can be asked for."""
    try:
        return difference(step(model, "sdpa", inputs), expected)[0]
    except ValueError:  # some part of the model does not support it
        return 0.0


def softmax_without_float32(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Models ask for float32 here, which raises the precision of float16, but lowers that of float64."""
    return torch.softmax(x, dim, torch.promote_types(x.dtype, dtype or x.dtype))


def differs_in_float64(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Also if the model has code that takes no float64."""
    model.double()
    inputs = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    try:
        with patch.object(nn.functional, "softmax", softmax_without_float32):
            expected, actual = step(model, "eager", inputs), step(model, fa_ext.NAME, inputs)
    except Exception:
        return True
    return any(x.isnan().any() for x in expected.values()) or difference(actual, expected)[0] > LARGEST_IN_FLOAT64


def examine(name: str) -> Finding:
    try:
        found: Architecture = smallest(name, reaches_attention)
    except RuntimeError as error:
        return Finding(name, "", str(error))
    model, calls, problem = found.model, 0, ""
    fa_ext.register()

    def counted(*args: object, **kwargs: object) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        return fa_ext.attention_function(*args, **kwargs)

    AttentionInterface.register(fa_ext.NAME, counted)
    try:
        expected = step(model, "eager", found.inputs)
        if any(x.isnan().any() for x in expected.values()):
            expected = step(model, "sdpa", found.inputs)
        error, where = difference(step(model, fa_ext.NAME, found.inputs), expected)
        rounded = error <= TOLERANCE or error <= min(3 * rounding(model, found.inputs, expected), LARGEST_TOLERANCE)
        if not rounded and differs_in_float64(model, found.inputs):
            problem = f"{where} differs"
        if not calls:
            problem = "not called"
    except Exception as error:
        problem = one_line(error)
    finally:
        fa_ext.register()
    return Finding(name, found.model_class.__name__, problem)


def row(finding: Finding) -> str:
    verdict = f"{'not' if finding.model else 'not examined'}: {finding.problem}" if finding.problem else "works"
    return f"| {finding.name} | {finding.model} | {verdict.replace('|', '/')} |"


def works(findings: Sequence[Finding]) -> float:
    """The share of those that count."""
    counted = [f for f in findings if f.counts]
    return sum(not f.problem for f in counted) / len(counted)


def table(findings: Sequence[Finding]) -> str:
    counted = [f for f in findings if f.counts]
    left_out = len(findings) - len(counted)
    summary = (
        f"transformers {transformers.__version__} has {len(findings)} such folders. In {left_out} of them eager "
        "attention cannot run here: the model has no attention, or needs a package that is not installed. Of the other "
        f"{len(counted)}, {sum(not f.problem for f in counted)} work: {100 * works(findings):.1f} %."
    )
    lines = [
        *textwrap.wrap(summary, 120),
        "",
        "| architecture | model | with ours |",
        "| --- | --- | --- |",
        *map(row, findings),
    ]
    return "\n".join(lines)


def assert_as_documented(finding: Finding) -> None:
    assert "differs" not in finding.problem
    page = PAGE.read_text()
    if f"transformers {transformers.__version__} has" not in page:
        assert finding.problem == "" or not finding.model  # another version, that overrides may not fit
    elif finding.counts:  # the others depend on what is installed
        assert row(finding) in page


NORMAL = sorted({*KNOWN, *OVERRIDES}.intersection(architectures()))


@pytest.mark.parametrize("name", NORMAL)
def test_architectures(name: str) -> None:
    finding = examine(name)
    assert finding.model or name not in KNOWN
    assert_as_documented(finding)


def test_a_wrong_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fa_ext.attention_function

    def without_mask(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: object):
        return right(module, query, key, value, None, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(fa_ext, "attention_function", without_mask)
        finding = examine("bert")
    fa_ext.register()  # the right one, for all tests that follow in this process
    assert "differs" in finding.problem


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_other_architectures(part: int) -> None:
    others = [name for name in architectures() if name not in NORMAL]
    findings = [examine(name) for name in others[part::PARTS]]
    for finding in findings:
        assert_as_documented(finding)
    assert works(findings) >= 0.95


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = []
    for architecture in architectures():
        found.append(examine(architecture))
        print(found[-1], file=sys.stderr, flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.partition(END)[2]}")
