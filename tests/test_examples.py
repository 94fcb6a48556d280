"""The examples run, reach what they promise, and notice what is wrong. (examples/cpp: test_cpp.py)"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the examples' packages are not installed")
pytest.importorskip("matplotlib", reason="the examples' packages are not installed")

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name / "train.py"), run_name=name)


def test_nanogpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLES.parent / "CONTRIBUTING.md").read_text() * 5)
    status = example("nanogpt")["main"](["--steps", "4", "--text", str(text), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "ok      every call ran here" in printed
    assert "ok      both runs follow the same loss curve" in printed
    assert (tmp_path / "train.png").exists()
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_nanogpt_wants_enough_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    with pytest.raises(SystemExit):
        example("nanogpt")["main"](["--text", str(text), "--output", str(tmp_path)])
    assert "--text must have more than" in capsys.readouterr().err


def test_vit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    status = example("vit")["main"](["--epochs", "5"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "swapped 4 nn.MultiheadAttention" in printed
    accuracy = [float(line.rsplit(" ", 1)[1].rstrip("%")) for line in printed.splitlines() if "accuracy" in line]
    assert min(accuracy) > 70


def test_vit_notices_wrong_attention(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from flash_attn_ext import modules

    right = modules.attend
    monkeypatch.setattr(modules, "attend", lambda *args, **options: tuple(1.1 * x for x in right(*args, **options)))
    assert example("vit")["main"](["--epochs", "1"]) == 1
