"""Training with our attention through what people train with: Trainer, checkpointing, autocast, accelerate, packing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="4.57", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_transformers import assert_close, assert_same, build, inputs_of, step, token_ids, valid_places
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from flash_attn_ext.integrations import transformers as fa_ext

IMPLEMENTATIONS = ("eager", fa_ext.NAME)
LENGTHS = (5, 11, 8, 13)


def examples() -> list[dict[str, list[int]]]:
    """Sequences that count upwards, so that there is something to learn."""
    starts = torch.randint(3, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [list(range(start, start + LENGTHS[i % 4])) for i, start in enumerate(starts)]
    return [{"input_ids": row, "labels": row} for row in rows]


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def fine_tuning(name: str, implementation: str, collator: Any, folder: Path, **options: Any) -> list[float]:
    """The losses of 25 steps of a Trainer."""
    model = build(name)
    model.set_attn_implementation(implementation)
    with patch.dict(os.environ):  # where transformers 4 leaves the dtype to the next Trainer
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=25,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **{"learning_rate": 1e-2, **options},
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples(), data_collator=collator)
        trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the dtype, too
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("collator", [padded, DataCollatorWithFlattening()], ids=["padded", "flattened"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_trainer(name: str, collator: Any, tmp_path: Path) -> None:
    eager, ours = (fine_tuning(name, implementation, collator, tmp_path) for implementation in IMPLEMENTATIONS)
    assert len(ours) == 25
    assert ours[-1] < 0.8 * ours[0]
    # The library writes losses with four decimals; rounding grows from step to step.
    assert ours == pytest.approx(eager, rel=2e-3)


@pytest.mark.parametrize("collator", [padded, DataCollatorWithFlattening()], ids=["padded", "flattened"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_trainer_with_checkpointing_and_bfloat16(name: str, collator: Any, tmp_path: Path) -> None:
    """The losses stay as near to those in float32 as eager attention's in bfloat16 do: the error rule of all tests."""
    # At three times this rate, rounding grows from step to step until luck is most of the distance.
    rate = {"learning_rate": 3e-3}
    options = {"bf16": True, "gradient_checkpointing": True, **rate}
    exact = torch.tensor(fine_tuning(name, "eager", collator, tmp_path, **rate))
    calls = fa_ext.stats().attended
    eager, ours = (
        torch.tensor(fine_tuning(name, implementation, collator, tmp_path, **options))
        for implementation in IMPLEMENTATIONS
    )
    assert fa_ext.stats().attended == calls + 25 * 2 * 2  # steps, layers, and once more for the backward
    assert 0 < (ours - exact).norm() <= 2 * (eager - exact).norm()
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.parametrize("with_lengths", [False, True])
def test_padding_free_batch_is_its_sequences(with_lengths: bool) -> None:
    """The flattened batch, with position_ids and with the lengths that the collator has for FlashAttention."""
    model = build("llama")
    model.set_attn_implementation(fa_ext.NAME)
    batch = [{"input_ids": token_ids(n, seed=n).tolist()} for n in LENGTHS]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths, return_tensors="pt")
    flat = {key: x for key, x in collator(batch).items() if key != "labels"}
    positions = torch.arange(sum(LENGTHS))[None]
    if with_lengths:  # which then have to keep the sequences apart by themselves
        flat["position_ids"] = positions
    together = model(**flat, use_cache=False).logits
    parts, first = [], 0
    for n in LENGTHS:
        ids = flat["input_ids"][:, first : first + n]
        where = positions[:, first : first + n] if with_lengths else positions[:, :n]
        parts.append(model(ids, position_ids=where, use_cache=False).logits)
        first += n
    alone = torch.cat(parts, 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5 * float(alone.detach().abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "bart"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    inputs = inputs_of(name, "right", torch.float32)
    valid = valid_places(inputs)
    expected = step(model, fa_ext.NAME, inputs, valid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_close(step(model, fa_ext.NAME, inputs, valid), expected)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert", "t5"])
def test_bfloat16_autocast(name: str) -> None:
    """No further from float32 than eager attention under autocast is, but for twice: the error rule of all tests."""
    model, inputs = build(name), inputs_of(name, "right", torch.float32)
    valid = valid_places(inputs)
    exact = step(model, "eager", inputs, valid)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = (step(model, implementation, inputs, valid) for implementation in IMPLEMENTATIONS)

    def error(result: dict[str, Tensor]) -> float:
        return max(float((result[key].float() - x).norm() / x.norm()) for key, x in exact.items() if x.norm() > 1e-3)

    assert 0 < error(ours) <= 2 * error(eager)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_bfloat16_weights(name: str) -> None:
    inputs = inputs_of(name, "right", torch.float32)
    valid = valid_places(inputs)
    exact = step(build(name), "eager", inputs, valid)["logits"]
    model = build(name, torch.bfloat16)
    eager, ours = (step(model, implementation, inputs, valid)["logits"].float() for implementation in IMPLEMENTATIONS)
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


def test_accelerate() -> None:
    losses = []
    for implementation in IMPLEMENTATIONS:
        accelerator = Accelerator(cpu=True)
        model = build("llama").train()
        model.set_attn_implementation(implementation)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses.append([])
        for first in range(0, 24, 4):
            loss = model(**padded(examples()[first : first + 4])).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_dropout_in_training() -> None:
    """Attention dropout is drawn from torch's generator: the same seed, the same outputs; none in eval."""
    model = build("bert").train()
    model.set_attn_implementation(fa_ext.NAME)
    inputs = inputs_of("bert", "right", torch.float32)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(**inputs).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert_same(model.eval(), inputs, valid_places(inputs))
