"""integrations.modules: swap and unswap of nn.MultiheadAttention, by itself and inside torch's transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import flash_attn_ext
from flash_attn_ext.integrations.modules import SwappedMultiheadAttention, stats, swap, unswap


class Renamed(nn.MultiheadAttention):
    """Somebody's own."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, **options), 2)


def test_swapped_model_is_the_same_object_with_the_same_weights() -> None:
    model = nn.ModuleDict(
        {"encoder": encoder(), "own": Renamed(16, 4), "ours": flash_attn_ext.MultiheadAttention(8, 2)}
    )
    before = {name: id(p) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    report = swap(model)
    assert report.swapped == ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
    assert list(report.left) == ["own"]
    assert "swapped 2" in str(report)
    assert "left own: " in str(report)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [id(module) for module in model.modules()] == modules
    assert isinstance(model["encoder"].layers[0].self_attn, flash_attn_ext.MultiheadAttention)
    assert swap(model).swapped == ()
    assert unswap(model) == report.swapped
    assert type(model["encoder"].layers[0].self_attn) is nn.MultiheadAttention
    assert type(model["ours"]) is flash_attn_ext.MultiheadAttention
    assert unswap(model) == ()


def test_the_model_itself() -> None:
    model = nn.MultiheadAttention(16, 4, kdim=8, vdim=6, dtype=torch.float64)
    q, k, v = normal(5, 2, 16), normal(7, 2, 8), normal(7, 2, 6)
    expected = model(q, k, v)[0]
    assert swap(model).swapped == ("",)
    assert "(the model itself)" in str(swap(nn.MultiheadAttention(4, 2)))
    torch.testing.assert_close(model(q, k, v, need_weights=False)[0], expected)
    assert unswap(model) == ("",)
    torch.testing.assert_close(model(q, k, v)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder(training: bool, norm_first: bool) -> None:
    model, x = encoder(norm_first=norm_first).train(training), normal(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [3]])
    parameters = list(model.parameters())

    def results() -> list[Tensor]:
        out = model(x, src_key_padding_mask=padding)[~padding]
        return [out, *torch.autograd.grad(out, parameters, normal(*out.shape, seed=1))]

    expected = results()
    swap(model)
    torch.testing.assert_close(results(), expected)
    unswap(model)
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_without_gradients_calls_the_module(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval mode torch's layer has a fast path, and its encoder nested tensors, that know nothing of modules."""
    model, x = encoder().eval(), normal(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [3]]) if padded else None
    shown = ~padding if padded else torch.ones(3, 7, dtype=torch.bool)
    calls: list[nn.Module] = []

    def counted(self: SwappedMultiheadAttention, *args: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        calls.append(self)
        return flash_attn_ext.MultiheadAttention.forward(self, *args, **options)

    monkeypatch.setattr(SwappedMultiheadAttention, "forward", counted)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)[shown]
        swap(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[shown], expected)
        assert calls == [layer.self_attn for layer in model.layers]
        assert not model.use_nested_tensor
        unswap(model)
        assert model.use_nested_tensor
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[shown], expected, rtol=0, atol=0)


def test_decoder_and_whole_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    source, target = normal(2, 6, 16), normal(2, 5, 16, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    parameters = list(model.parameters())

    def results() -> list[Tensor]:
        out = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    expected = results()
    assert len(swap(model).swapped) == 5
    torch.testing.assert_close(results(), expected)


def test_training_goes_on_where_it_was() -> None:
    """An optimizer made before the swap keeps its state, and state dicts fit both ways."""
    losses = {}
    for swapped in (False, True):
        model, x = encoder(), normal(3, 7, 16)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses[swapped] = []
        for step in range(6):
            if swapped and step == 3:
                swap(model)
                model.load_state_dict(encoder().state_dict() | model.state_dict())
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[swapped].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 6, "add_bias_kv": True}])
def test_parameters_are_reset_as_torch_resets_them(options: dict[str, object]) -> None:
    drawn = []
    for swapped in (False, True):
        torch.manual_seed(5)
        model = nn.MultiheadAttention(16, 4, **options)
        if swapped:
            swap(model)
        model._reset_parameters()
        assert type(model) is (SwappedMultiheadAttention if swapped else nn.MultiheadAttention)
        drawn.append(model.state_dict())
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_tensors_raise(need_weights: bool, layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=layout)
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    swap(model)
    with torch.no_grad(), pytest.raises(flash_attn_ext.InputError, match="must not be nested tensors"):
        model(x, x, x, need_weights=need_weights)


def test_scripting_needs_torchs_modules() -> None:
    model = nn.MultiheadAttention(16, 4)
    swap(model)
    with pytest.raises(RuntimeError):
        torch.jit.script(model)
    unswap(model)
    torch.jit.script(model)


def test_who_gets_the_matrix_of_weights_is_said_and_counted() -> None:
    model, x = nn.ModuleDict({"encoder": encoder(), "direct": nn.MultiheadAttention(16, 4)}).double(), normal(3, 7, 16)
    report = swap(model)
    assert report.called_directly == ("direct",)
    assert "need_weights=False: direct" in str(report)
    before = stats()
    model["encoder"](x)
    model["direct"](x, x, x, need_weights=False)
    model["direct"](x, x, x)
    asked = "need_weights=True, the default"
    assert stats().attended == before.attended + 3
    assert stats().returned[asked] == before.returned.get(asked, 0) + 1
    assert f"went back to torch: {asked}" in str(stats())


def test_copies_and_pickles() -> None:
    model, x = encoder(), normal(3, 7, 16)
    swap(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert len(unswap(other)) == 2
        assert other.use_nested_tensor
    assert len(unswap(model)) == 2


def test_swapped_encoder_compiles() -> None:
    model, x = encoder(), normal(3, 7, 16)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = stats()
    out = compiled(x)
    torch.testing.assert_close(compiled(x), out)
    assert (stats().traced, stats().attended) == (before.traced + 2, before.attended)
    torch.testing.assert_close(out, model(x))
    torch._dynamo.reset()
