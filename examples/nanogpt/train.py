"""A nanoGPT in two runs from one seed: with torch's scaled_dot_product_attention, and with the same code sent here.

    python examples/nanogpt/train.py [--text FILE] [--steps N] [--output FOLDER] [--json FILE]

The model knows nothing of this package: it calls torch.nn.functional.scaled_dot_product_attention. One line before the
second run, `sdpa.enable()`, is the whole change. It prints what became of the calls, and draws both loss curves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor

from flash_attn_ext.demo.common import Demo, attention_device
from flash_attn_ext.demo.train import Settings, Text, compare, progress_bar, sample, train
from flash_attn_ext.integrations import sdpa


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nanoGPT has it; q, k, v (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains twice; returns 1 if the curves differ or a call went back to torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="file to learn from (default: Python's own help texts)")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--output", type=Path, default=Path("nanogpt_output"), help="folder of the plot (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures: by name, torch's and ours")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    demo, s, device = Demo(Console(), options.output), Settings(steps=options.steps), attention_device()
    text = Text(s.vocabulary, options.text.read_text() if options.text else None)
    s.vocabulary = len(text.tokens)
    if len(text.held_out) <= s.context:
        parser.error(f"--text must have more than {20 * s.context} words and marks, has {len(text.ids)}")
    demo.console.print(f"{len(text.ids):,} tokens, {s.layers} layers of width {s.width}, float32 on {device.type}")
    with progress_bar(demo) as progress:
        runs = {"SDPA": train(attend, text, s, device, progress, "torch's SDPA")}
        with sdpa.enable():
            runs["ours"] = train(attend, text, s, device, progress, "ours")
            stats = sdpa.stats()
    demo.console.print(f"  {stats}", highlight=False)
    demo.check(stats.attended > 0 and not stats.returned, "every call ran here")
    compare(demo, runs)
    if options.json:
        torchs, ours = runs["SDPA"], runs["ours"]
        figures = {
            "loss, first step": (torchs.losses[0], ours.losses[0]),
            f"loss, step {s.steps}": (torchs.losses[-1], ours.losses[-1]),
            "loss on text that it has not seen": (torchs.held_out, ours.held_out),
        }
        options.json.write_text(json.dumps(figures))
    written = sample(runs["ours"].model, text, s, device, prompt=text.tokens[1])
    demo.console.print(written, style="italic", markup=False, highlight=False)
    return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(main())
