"""The examples run, reach what they promise, and notice what is wrong. (examples/cpp: test_cpp.py)"""

from __future__ import annotations

import importlib
import json
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


def test_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example writes is what the table shows."""
    pytest.importorskip("sklearn")
    record = runpy.run_path(str(EXAMPLES / "record.py"))
    figures = record["written"]("vit/train.py", tmp_path, "--epochs", "2")
    assert figures["loss, first step"] == pytest.approx([2.46, 2.46], abs=0.01)
    share = next(x for name, x in figures.items() if name.endswith("%"))
    assert all(10 < x < 100 for x in share)  # better than chance, and not a fraction of 1
    folder = tmp_path / "machine"
    folder.mkdir()
    environment = {"commit": "c", "torch": "t", "cpu": "p", "cpu_level": "avx2"}
    records = [{"example": "vit", "figures": figures}, {"example": "cpp", "figures": {"loss": (None, 1.25)}}]
    (folder / "examples.json").write_text(json.dumps({"environment": environment, "records": records}))
    tables = importlib.import_module("tables")  # beside what record.py imports
    shown = tables.examples(tmp_path)
    assert f"| vit | digits that it has not seen, right, % | {share[0]:.1f} | {share[1]:.1f} |" in shown
    assert "| cpp | loss | - | 1.2500 |" in shown
