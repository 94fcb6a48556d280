"""Modules: FlashAttention, the attention of a layer without parameters around it, and MultiheadAttention, which takes
the place of torch.nn.MultiheadAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from .attention import attend, lengths_of, window_of
from .errors import InputError, raise_input_error, refuse, wrong_kinds

_OPTIONS = {
    "softmax_scale": "number?",
    **dict.fromkeys(("softcap", "dropout_p"), "number"),
    **dict.fromkeys(("alibi_slopes", "sinks"), "tensor?"),
    "deterministic": "flag",
}
_KINDS = {
    **dict.fromkeys(("query", "key", "value"), "tensor"),
    **dict.fromkeys(("key_padding_mask", "attn_mask"), "tensor?"),
}


class FlashAttention(nn.Module):
    """`attention` and `attention_varlen` with the options of a layer set once.

    Args:
        causal, window_size, softmax_scale, softcap, deterministic: as in `attention`.
        dropout_p: applied in training mode only.
        alibi_slopes: (heads,) or (batch, heads) float32, kept as a buffer that is not saved, and in float32 whatever
            dtype the module is converted to.
        sinks: (heads,), kept as a parameter.

    Raises:
        InputError: an option is of the wrong kind. What depends on the tensors of a call, the call says.
    """

    alibi_slopes: Tensor | None

    def __init__(
        self,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        unmet = [*window_of(causal, window_size)[1], *wrong_kinds(locals(), _OPTIONS).values()]
        if unmet:
            refuse("FlashAttention", unmet)
        self.causal = causal
        self.window_size = window_size
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.deterministic = deterministic
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.register_parameter("sinks", None if sinks is None else nn.Parameter(sinks))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """(batch, seqlen, heads, dim) tensors as in `attention`; beside cu_seqlens_q packed ones as in
        `attention_varlen`. Returns out, or (out, lse) with return_lse."""
        window, unmet = window_of(self.causal, self.window_size)
        out, lse = attend(
            "FlashAttention",
            q,
            k,
            v,
            unmet,
            window=window,
            **lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            bias=bias,
            mask=mask,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            dropout_p=self.dropout_p if self.training else 0.0,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            deterministic=self.deterministic,
        )
        return (out, lse) if return_lse else out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlashAttention:
        """What .to(), .bfloat16() and their like do to parameters and buffers."""
        before = self.alibi_slopes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.alibi_slopes
        if before is not None and after is not None and after.dtype != before.dtype:
            self.alibi_slopes = before.to(after.device)  # not cast back: the values may have been rounded
        return self

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"causal": self.causal}
        for name, default in (("window_size", (-1, -1)), ("softmax_scale", None), ("softcap", 0.0)):
            if (value := getattr(self, name)) != default:
                shown[name] = value
        shown["dropout_p"] = self.dropout_p
        for name in ("alibi_slopes", "sinks"):
            if (tensor := getattr(self, name)) is not None:
                shown[name] = tuple(tensor.shape)
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with this package's attention: same arguments, parameters, state dict and results.

    With need_weights=False no matrix of weights exists anywhere. need_weights=True (the default, as there) asks for
    that matrix, so it is computed with torch's operations, and the output from it. Two differences, both on purpose:
    a row whose every key is masked gives zeros in both cases, where torch gives NaN in one of them, and `is_causal`
    beside add_bias_kv or add_zero_attn follows attn_mask, where torch's hint hides the added keys from some rows.

    Nested tensors raise, and torch.jit.script does not take the module; torch.export does.

    A torch.nn.TransformerEncoderLayer in eval mode without gradients computes its attention itself, from the
    parameters, and calls no module; torch.backends.mha.set_fastpath_enabled(False) makes it call this one.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Self- or cross-attention, unbatched, or batched in the order that batch_first says.

        Args:
            query: (seqlen_q, embed_dim), (seqlen_q, batch, embed_dim), or (batch, seqlen_q, embed_dim).
            key: (seqlen_k, kdim) or batched; value: (seqlen_k, vdim) or batched.
            key_padding_mask: (seqlen_k) or (batch, seqlen_k): bool, True = ignore this key, or float, added.
            need_weights: also return the weights.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k): bool, True = may not attend, or
                float, added.
            average_attn_weights: the weights as a mean over the heads.
            is_causal: a hint that attn_mask, which must be given, is the causal mask.

        Returns:
            (output like query, weights or None); weights (batch, seqlen_q, seqlen_k), or with average_attn_weights
            False (batch, num_heads, seqlen_q, seqlen_k); without the batch where the input has none.

        Raises:
            InputError: a ValueError and TypeError that lists every unmet constraint.
        """
        try:
            if query.is_nested or key.is_nested or value.is_nested:
                instead = "pad them and pass a key_padding_mask, or leave the module torch.nn.MultiheadAttention"
                raise InputError("MultiheadAttention", [f"query, key and value must not be nested tensors: {instead}"])
            ranks = (query.dim(), key.dim(), value.dim())
            if ranks not in ((2, 2, 2), (3, 3, 3)):
                line = f"query, key and value must all have 2 dimensions (unbatched) or 3 (batched), got {ranks}"
                raise InputError("MultiheadAttention", [line])
            batched = query.dim() == 3
            if not batched:
                key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

            def batch_first(x: Tensor) -> Tensor:
                return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

            self_attention = query is key and key is value
            query, key, value = batch_first(query), batch_first(key), batch_first(value)
            self._check(query, key, value, key_padding_mask, attn_mask, is_causal)

            q, k, v = self._project(query, key, value, self_attention)
            bias, mask = self._masks(q, key_padding_mask, attn_mask, k.shape[1] - key.shape[1])
            dropout_p = self.dropout if self.training else 0.0
            weights = None
            if need_weights:
                out, weights = _attention_with_weights(q, k, v, bias, mask, dropout_p)
                weights = weights.mean(1) if average_attn_weights else weights
            else:
                hint = is_causal and key_padding_mask is None and k.shape[1] == key.shape[1]
                # attn_mask's diagonal starts in the top left corner, that of the window ends in the bottom right one.
                window = (None, q.shape[1] - k.shape[1] if hint else None)
                bias, mask = (None, None) if hint else (bias, mask)
                options: dict[str, Any] = {"window": window, "bias": bias, "mask": mask, "dropout_p": dropout_p}
                out, _ = attend("MultiheadAttention", q, k, v, **options)
            out = self.out_proj(out.flatten(2))

            if not batched:
                return out.squeeze(0), None if weights is None else weights.squeeze(0)
            return out if self.batch_first else out.transpose(0, 1), weights
        except Exception as error:
            raise_input_error("MultiheadAttention", error, locals(), _KINDS)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Constraints on batch-first tensors."""
        unmet = []
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        weight = self.out_proj.weight
        for name, x in {"query": query, "key": key, "value": value}.items():
            if x.device != weight.device:
                unmet.append(f"{name} must be on the parameters' device {weight.device}, got {x.device}")
            if x.dtype != weight.dtype and not _autocast_takes(x):
                unmet.append(f"{name} must have the parameters' dtype {weight.dtype}, got {x.dtype}")
            if x.shape[-1] != widths[name] or x.shape[0] != query.shape[0]:
                unmet.append(
                    f"{name} must have {widths[name]} features and query's batch {query.shape[0]}, got shape "
                    f"{tuple(x.shape)} (in batch-first order)"
                )
        if not unmet and key.shape[1] != value.shape[1]:
            unmet.append(f"value must have key's seqlen_k {key.shape[1]}, got {value.shape[1]}")
        if is_causal and attn_mask is None:
            unmet.append("attn_mask must be given where is_causal is True, which is a hint that it is the causal mask")
        for name, mask in {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}.items():
            if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
                unmet.append(f"{name} must be bool or floating point, got {mask.dtype}")
        if not unmet:
            batch, seqlen_q, seqlen_k = *query.shape[:2], key.shape[1]
            if key_padding_mask is not None and key_padding_mask.shape != (batch, seqlen_k):
                expected = f"(batch, seqlen_k) = {(batch, seqlen_k)}, or (seqlen_k,) without a batch"
                unmet.append(f"key_padding_mask must have shape {expected}, got {tuple(key_padding_mask.shape)}")
            shapes = ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k))
            if attn_mask is not None and attn_mask.shape not in shapes:
                unmet.append(
                    f"attn_mask must have shape (seqlen_q, seqlen_k) = {shapes[0]} or (batch * num_heads, seqlen_q, "
                    f"seqlen_k) = {shapes[1]}, got {tuple(attn_mask.shape)}"
                )
        if unmet:
            raise InputError("MultiheadAttention", unmet)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (batch, seqlen, heads, head_dim), with the keys that add_bias_kv and add_zero_attn append."""
        if self_attention and self.in_proj_weight is not None:
            q, k, v = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (linear(*args) for args in zip((query, key, value), weights, biases, strict=True))
        batch = k.shape[0]  # len() would fix its size where a tracer wants it free
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, b.expand(batch, -1, -1)), 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        return q, k, v

    def _masks(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, added_keys: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(bias, mask) as `attention` takes them: mask True = attend. Added keys are seen by all rows."""
        bias: Tensor | None = None
        mask: Tensor | None = None
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        for given in (key_padding_mask, attn_mask):
            if given is None:
                continue
            if given.dtype == torch.bool:
                visible = pad(~given, (0, added_keys), value=True)
                mask = visible if mask is None else mask & visible
            else:
                added = pad(given, (0, added_keys))
                if added.dtype != torch.float32 or q.dtype == torch.float64:
                    added = added.to(q.dtype)
                bias = added if bias is None else bias + added
        return bias, mask


def _autocast_takes(x: Tensor) -> bool:
    device = x.device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return casts and x.is_floating_point() and x.dtype != torch.float64


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out (batch, seqlen_q, heads, head_dim), weights (batch, heads, seqlen_q, seqlen_k)), with torch's operations."""
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # A row of -inf has no softmax, and its NaN would reach every gradient: it computes with zeros, and is zero.
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights = dropout(weights, dropout_p)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2), weights
