"""Part 2: a small GPT learns Python's own help texts, with softmax attention and with ours swapped in."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import attention
from .common import COLOURS, Attention, Demo, attention_device, causal_softmax_attention, mib
from .memory import PeakMemory

SEED = 1337
TEMPERATURE = 0.8


@dataclass
class Settings:
    steps: int = 400
    batch: int = 4
    context: int = 256
    width: int = 128
    heads: int = 4
    layers: int = 4
    learning_rate: float = 3e-3
    vocabulary: int = 2048
    sample: int = 150


class SelfAttention(nn.Module):
    def __init__(self, s: Settings, attend: Attention):
        super().__init__()
        self.heads, self.attend = s.heads, attend
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.proj = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (batch, row, head, dim)
        out: Tensor = self.proj(self.attend(q, k, v).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, s: Settings, attend: Attention):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(s.width), SelfAttention(s, attend))
        self.mlp = nn.Sequential(
            nn.LayerNorm(s.width), nn.Linear(s.width, 4 * s.width), nn.GELU(), nn.Linear(4 * s.width, s.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(x)
        return out


class GPT(nn.Module):
    """Decoder-only transformer, pre-norm, learned positions."""

    def __init__(self, s: Settings, attend: Attention):
        super().__init__()
        self.token = nn.Embedding(s.vocabulary, s.width)
        self.position = nn.Parameter(0.02 * torch.randn(s.context, s.width))
        self.blocks = nn.Sequential(*(Block(s, attend) for _ in range(s.layers)), nn.LayerNorm(s.width))
        self.head = nn.Linear(s.width, s.vocabulary)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.token(ids) + self.position[: ids.shape[1]]))
        return logits


@dataclass
class Trained:
    model: GPT
    losses: list[float]
    seconds: float
    bytes: float
    held_out: float


class Text:
    """A text, Python's help topics by default, as numbers of tokens: frequent words, runs of marks and of spaces; 0 is
    any other."""

    def __init__(self, vocabulary: int, text: str | None = None):
        if text is None:
            text = "\n\n".join(topics[name] for name in sorted(topics))
        pieces = re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)
        self.tokens = ["", *(piece for piece, _ in Counter(pieces).most_common(vocabulary - 1))]
        self.number = {token: index for index, token in enumerate(self.tokens)}
        self.ids = torch.tensor([self.number.get(piece, 0) for piece in pieces])
        split = len(self.ids) * 19 // 20
        self.train, self.held_out = self.ids[:split], self.ids[split:]


def batch_of(ids: Tensor, s: Settings, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - s.context, (s.batch, 1), generator=generator)
    rows = ids[starts + torch.arange(s.context + 1)].to(device)
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(attend: Attention, text: Text, s: Settings, device: torch.device, progress: Progress, name: str) -> Trained:
    torch.manual_seed(SEED)
    model = GPT(s, attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), s.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.learning_rate, s.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    warm_up = batch_of(text.held_out, s, torch.Generator().manual_seed(SEED), device)
    torch.autograd.backward(loss_of(model, warm_up))
    bar = progress.add_task(f"training with {name}", total=s.steps, loss=float("nan"))
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        for _ in range(s.steps):
            optimizer.zero_grad()
            loss = loss_of(model, batch_of(text.train, s, generator, device))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=losses[-1])
        elapsed = time.perf_counter() - start
    with torch.no_grad():
        held_out = sum(loss_of(model, batch_of(text.held_out, s, generator, device)).item() for _ in range(8)) / 8
    return Trained(model, losses, elapsed, peak.bytes, held_out)


@torch.no_grad()
def sample(model: GPT, text: Text, s: Settings, device: torch.device, prompt: str = "The") -> str:
    """Continues the prompt, one known token at a time."""
    generator = torch.Generator().manual_seed(SEED)
    ids = [text.number[prompt]]
    for _ in range(s.sample):
        logits = model(torch.tensor([ids[-s.context :]], device=device))[0, -1]
        probabilities = (logits[1:] / TEMPERATURE).softmax(-1).cpu()
        ids.append(1 + int(torch.multinomial(probabilities, 1, generator=generator)))
    return "".join(text.tokens[index] for index in ids)


def run(demo: Demo) -> None:
    device = attention_device()
    s = Settings(steps=8, batch=2, context=64, width=32, layers=2, sample=20) if demo.quick else Settings()
    text = Text(s.vocabulary)
    attentions: dict[str, Attention] = {"softmax": causal_softmax_attention, "ours": partial(attention, causal=True)}
    demo.console.print(
        f"A GPT of {s.layers} layers, width {s.width}, {s.heads} heads, context {s.context} learns"
        f" Python's help texts ({len(text.ids):,} tokens), twice from the same seed,"
        f" in float32 on {device.type}."
    )
    with progress_bar(demo) as progress:
        runs = {name: train(attend, text, s, device, progress, name) for name, attend in attentions.items()}
    compare(demo, runs)
    demo.console.print("  what the model with our attention writes:")
    demo.console.print(sample(runs["ours"].model, text, s, device), style="italic", markup=False, highlight=False)


def progress_bar(demo: Demo) -> Progress:
    task, loss = TextColumn("{task.description}"), TextColumn("loss {task.fields[loss]:.3f}")
    return Progress(task, BarColumn(), loss, TimeRemainingColumn(), console=demo.console)


def compare(demo: Demo, runs: dict[str, Trained]) -> None:
    """Prints and plots two runs, of which the second is ours, and checks that they follow the same loss curve."""
    for name, trained in runs.items():
        demo.console.print(
            f"  {name:<8} loss {trained.losses[0]:.4f} -> {trained.losses[-1]:.4f}, held out {trained.held_out:.4f};"
            f" {trained.seconds:.1f} s, {mib(trained.bytes)} beyond the weights"
        )
    distance = [abs(a - b) for a, b in zip(*(trained.losses for trained in runs.values()), strict=True)]
    demo.console.print(
        f"  distance of the loss curves: {distance[0]:.1e} at the first step, {max(distance):.1e} at most"
    )
    # Rounding differs, and training amplifies it with every step; a wrong gradient shows from the second step on.
    demo.check(max(distance[:8]) < 1e-4 and max(distance) < 0.02, "both runs follow the same loss curve")

    with demo.plot("train", 2) as (loss_axes, distance_axes):
        for (name, trained), style, colour in zip(runs.items(), ("-", "--"), COLOURS.values(), strict=True):
            loss_axes.plot(trained.losses, style, label=name, color=colour)
        loss_axes.set(title="training loss", xlabel="step", ylabel="nats per token")
        loss_axes.legend(frameon=False)
        distance_axes.semilogy([max(d, 1e-8) for d in distance], color="black", linewidth=0.8)
        distance_axes.set(title="distance of the curves", xlabel="step")
