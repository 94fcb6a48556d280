"""The documentation: its Python blocks run, its tables of calls hold, its errors are raised, and its site builds.

Blocks of one page run in their order and share a namespace. Comments right before a block say more about it:

    <!-- needs gpu -->, <!-- needs MODULE -->    left out where that is missing
    <!-- raises -->                              raises the error that the heading above quotes

and `<!-- said in FILE -->` below a heading: the file has the words that the heading quotes.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES.append(ROOT / "benchmarks/README.md")
MIGRATING, TROUBLESHOOTING = ROOT / "docs/migrating.md", ROOT / "docs/troubleshooting.md"


def pages(having: str) -> pytest.MarkDecorator:
    found = [page for page in PAGES if having in page.read_text()]
    return pytest.mark.parametrize("page", found, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    code: str
    """With blank lines in front, so that the line numbers of a failure are those of the page."""
    needs: list[str]
    raises: str | None
    """The message, or a part of it."""

    @property
    def missing(self) -> bool:
        there = {"gpu": torch.cuda.is_available}
        return not all(there.get(n, lambda n=n: importlib.util.find_spec(n) is not None)() for n in self.needs)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for block in re.finditer(r"((?:^<!-- [^\n]* -->\n)*)^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        remarks = re.findall(r"<!-- (.*) -->", block[1])
        needs = [remark.removeprefix("needs ") for remark in remarks if remark.startswith("needs ")]
        headings = re.findall(r"^#+ `(.*)`$", text[: block.start()], re.MULTILINE)
        raises = headings[-1] if "raises" in remarks else None
        found.append(Block("\n" * text.count("\n", 0, block.start(2)) + block[2], needs, raises))
    assert len(found) == text.count("```python")
    return found


def run_page(page: Path) -> dict[str, Any]:
    """Runs the blocks of a page, and returns their namespace."""
    module = ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module  # torch.compile looks for the globals of a function there
    namespace = vars(module)
    for block in blocks(page):
        if block.missing:
            continue
        compiled = compile(block.code, str(page), "exec")
        if block.raises is None:
            exec(compiled, namespace)
            continue
        with pytest.raises(Exception, match=re.escape(block.raises)):
            exec(compiled, namespace)
    return namespace


@pages(having="```python")
def test_page_runs(page: Path) -> None:
    found = blocks(page)
    assert sum("assert" in block.code or block.raises is not None for block in found) >= len(found) - 1
    run_page(page)


@pages(having="](")
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert targets == {"demo", "test"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# ---- Troubleshooting ------------------------------------------------------------------------------------------------


def test_every_message_is_shown_or_found() -> None:
    """Every heading that quotes a message is followed by a call that raises it, or by the file that says it."""
    sections = re.split(r"^#+ ", TROUBLESHOOTING.read_text(), flags=re.MULTILINE)[1:]
    messages = [section for section in sections if section.startswith("`")]
    assert len(messages) > 30
    for section in messages:
        message = section[1 : section.index("`\n")]
        said_in = re.findall(r"<!-- said in (.*) -->", section)
        assert len(said_in) + section.count("<!-- raises -->") == 1, message
        for file in said_in:
            assert message in (ROOT / file).read_text(), message


# ---- Tables of calls ------------------------------------------------------------------------------------------------


def call_tables() -> Iterator[tuple[str, str, str]]:
    """(library, its call, ours), of each row."""
    for library, table in re.findall(r"<!-- calls (\S+) -->\n(.*?)\n\n(?!\|)", MIGRATING.read_text(), re.DOTALL):
        for theirs, ours in re.findall(r"^\| `(.*)` \| `(.*)` \|$", table, re.MULTILINE):
            yield library, theirs, ours


def tensors() -> dict[str, Tensor]:
    """In the layout (batch, rows, heads, dim)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {"": (2, 48, 4, 32), "g": (2, 48, 2, 32), "_long": (2, 64, 4, 32), "_packed": (48, 4, 32)}
    made = {f"{x}{suffix}": normal(*shape) for suffix, shape in shapes.items() for x in "qkv"}
    return made | {"bias": normal(4, 48, 48), "mask": normal(48, 48) > -1}


def heads_first(name: str, x: Tensor) -> Tensor:
    if name[0] not in "qkv":
        return x
    x = x[None] if x.dim() == 3 else x
    return x.transpose(1, 2)


def flash_attn_standing_in() -> dict[str, Callable[..., Any]]:
    """What the functions of flash-attn compute, by the specification."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any) -> Any:
        assert longest == (28, 28)
        return reference.attention_varlen(q, k, v, cu_q, cu_k, **options)

    def dense(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False, **options: Any) -> Any:
        return reference.attention(q, k, v, return_lse=return_attn_probs, **options)

    return {
        "flash_attn_func": dense,
        "flash_attn_qkvpacked_func": lambda qkv, **options: dense(*qkv.unbind(2), **options),
        "flash_attn_kvpacked_func": lambda q, kv, **options: dense(q, *kv.unbind(2), **options),
        "flash_attn_varlen_func": varlen,
    }


@dataclass(frozen=True)
class BlockDiagonal:
    lengths: list[int]
    causal: bool = False

    def make_causal(self) -> BlockDiagonal:
        return BlockDiagonal(self.lengths, causal=True)

    def __call__(self, rows: int, keys: int) -> Tensor:
        blocks = [torch.ones(n, n, dtype=torch.bool) for n in self.lengths]
        return torch.block_diag(*(block.tril() if self.causal else block for block in blocks)).bool()


def xformers_standing_in() -> dict[str, Any]:
    """memory_efficient_attention and its masks, as functions of the numbers of rows and keys, by torch's attention."""

    def lower(rows: int, keys: int, diagonal: int) -> Tensor:
        return torch.ones(rows, keys, dtype=torch.bool).tril(diagonal)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, scale: float | None = None) -> Tensor:
        mask = attn_bias(q.shape[1], k.shape[1]) if callable(attn_bias) else attn_bias
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def local(window: int) -> Callable[[int, int], Tensor]:
        return lambda rows, keys: lower(rows, keys, keys - rows) & ~lower(rows, keys, keys - rows - window)

    masks = SimpleNamespace(
        LowerTriangularFromBottomRightMask=lambda: lambda rows, keys: lower(rows, keys, keys - rows),
        LowerTriangularFromBottomRightLocalAttentionMask=local,
        BlockDiagonalMask=SimpleNamespace(from_seqlens=BlockDiagonal),
    )
    top_left = lambda: lambda rows, keys: lower(rows, keys, 0)  # noqa: E731
    return {
        "xops": SimpleNamespace(memory_efficient_attention=attend, LowerTriangularMask=top_left),
        "attn_bias": masks,
    }


@pytest.fixture(scope="module")
def migrating() -> dict[str, Any]:
    return run_page(MIGRATING)


def test_every_library_has_a_table() -> None:
    rows = [library for library, _, _ in call_tables()]
    assert {library: rows.count(library) >= 8 for library in rows} == dict.fromkeys(
        ("SDPA", "flash-attn", "xformers", "FlexAttention"), True
    )


@pytest.mark.filterwarnings("ignore")  # that FlexAttention is slow without a compiler
@pytest.mark.parametrize(("library", "theirs", "ours"), list(call_tables()))
def test_both_sides_of_a_table_compute_the_same(
    library: str, theirs: str, ours: str, migrating: dict[str, Any]
) -> None:
    inputs = tensors()
    more = {"cu": torch.tensor([0, 20, 48], dtype=torch.int32), "longest": 28}
    here = eval(ours, migrating | more | inputs)
    of_library = library in ("SDPA", "FlexAttention")
    their_inputs = {name: heads_first(name, x) for name, x in inputs.items()} if of_library else inputs
    standing_in = {"flash-attn": flash_attn_standing_in, "xformers": xformers_standing_in}.get(library, dict)()
    there = eval(theirs, migrating | more | their_inputs | standing_in)
    there = there.transpose(1, 2).reshape(here.shape) if of_library else there
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-11)
    if library == "flash-attn":
        drop_in = eval(
            theirs, migrating | more | inputs | {name: getattr(flash_attn_ext, name) for name in standing_in}
        )
        torch.testing.assert_close(drop_in, here, rtol=1e-9, atol=1e-11)


# ---- The site -------------------------------------------------------------------------------------------------------


def public_names() -> list[str]:
    names = [f"flash_attn_ext.{name}" for name in flash_attn_ext.__all__]
    for part in ("sdpa", "modules", "transformers", "dtensor", "masks"):
        module = import_module(f"flash_attn_ext.integrations.{part}")
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                names.append(f"{module.__name__}.{name}")
    return names


def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("transformers")
    command = re.search(r"-m sphinx (.*) docs build/docs", (ROOT / "Makefile").read_text())
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *command[1].split(), ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "sphinx.ext.intersphinx", tmp_path / "site/objects.inv"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    documented = set(re.findall(r"flash_attn_ext[\w.]+", listed))
    assert [name for name in public_names() if name not in documented] == []
    for page in (ROOT / "docs").glob("*.md"):
        for image in re.findall(r'<img [^>]*src="([^"]+)"', (tmp_path / f"site/{page.stem}.html").read_text()):
            assert (tmp_path / "site" / image).exists(), image


def test_names_in_the_readme_need_no_further_import() -> None:
    names = sorted(set(re.findall(r"`(flash_attn_ext(?:\.\w+)+)\(", (ROOT / "README.md").read_text())))
    assert len(names) >= 5
    # An interpreter of its own: others have imported what the names are in.
    subprocess.run([sys.executable, "-c", f"import flash_attn_ext; {'; '.join(names)}"], check=True, cwd=ROOT)
