"""timm's vision transformer while `sdpa` is enabled: our attention, with torch's outputs and gradients."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_ext.integrations import sdpa

missing = [name for name in ("timm", "torchvision") if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # The package index has it for CUDA. Beside torch's CPU wheel its operators, which timm does not call, cannot load,
    # and it imports once the two that it describes to torch have a schema.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

LAYERS = 3


def results(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Logits and the gradients of all parameters."""
    logits = model(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "map"}, {"qk_norm": True}])
def test_vision_transformer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": LAYERS, "num_heads": 3, "num_classes": 10}
    model = VisionTransformer(**sizes, **options).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = results(model, images)
    with sdpa.enable():
        actual = results(model, images)
        stats = sdpa.stats()
    pooling = options.get("global_pool") == "map"
    assert (stats.attended, stats.returned) == (LAYERS + pooling, {}), stats
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
