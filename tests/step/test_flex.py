"""FlexAttention: one compiled graph for batches of all shapes, and its check against SDPA on the first batch."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from helpers.llava import make_example, make_image, packed_images, tiny_llava
from helpers.packed import gradients, orpo_of, packed_of
from llava_orpo.step import attention
from llava_orpo.step.packing import TokenPair, pack, response_logps

# (prompt, chosen, rejected) tokens of every pair: one block and less, whole blocks, several groups
SHAPES = [[(50, 6, 8)], [(300, 20, 10)], [(401, 33, 7)], [(150, 3, 9), (222, 11, 5)], [(90, 5, 5)] * 3, [(200, 28, 28)]]


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.setattr(attention._flex, "serves", None)


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(attention.logger, "warning", said.append)
    return said


def states(layout, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def layout_of(sizes):
    return pack([[TokenPair([1] * p, [2] * c, [3] * r)] for p, c, r in sizes]).layout


def run_all_shapes(compiled, monkeypatch):
    monkeypatch.setattr(attention, "_eager_flex", lambda: compiled)
    with torch.no_grad():
        for sizes in SHAPES:
            layout = layout_of(sizes)
            made = states(layout)
            output = attention._flex_attention(*made, layout, None, 0.0)
            expected = attention._sdpa_attention(*made, layout, None, 0.0)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert attention._flex.serves


def test_one_graph_is_compiled_for_all_lengths_and_groups(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    run_all_shapes(torch.compile(flex_attention, dynamic=True, backend=counter), monkeypatch)
    assert counter.frame_count == 1


@pytest.mark.heavy
def test_one_kernel_is_compiled_for_all_lengths_and_groups(monkeypatch):
    """By torch's own compiler: the forward on a CPU, the only part of it that needs no GPU."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    run_all_shapes(torch.compile(flex_attention, dynamic=True, backend=counter), monkeypatch)
    assert counter.frame_count == 1


def test_padding_sees_itself_alone_and_nothing_sees_it():
    for sizes in SHAPES:
        layout = layout_of(sizes)
        length, padded = layout.num_tokens, layout.flex_length
        mask = layout.block_mask()
        assert padded % 128 == 0 and 256 <= padded and length <= padded < max(length + 128, 257)
        assert mask.seq_lengths == (padded, padded)
        i, j = torch.arange(padded)[:, None], torch.arange(padded)
        seen = mask.mask_mod(0, 0, i, j)
        assert seen.diagonal().all(), "a query that sees nothing would be a division by zero"
        assert not seen[:length, length:].any() and not seen[length:, :length].any()


def right(query, key, value, block_mask, scale, enable_gqa):
    """The same attention with a dense mask: unlike FlexAttention on a CPU it has a backward."""
    length = query.shape[2]
    mask = block_mask.mask_mod(0, 0, torch.arange(length)[:, None], torch.arange(length))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def leaky(query, key, value, block_mask, scale, enable_gqa):
    """Responses see the other responses before them."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa)


def not_a_number(*args, **kwargs):
    return right(*args, **kwargs) * float("nan")


def failing(*args, **kwargs):
    raise RuntimeError("no valid triton configs\nand a long trace")


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.5 * gradient


def wrong_backward(query, key, value, **kwargs):
    return right(query, _WrongGradient.apply(key), value, **kwargs)


def the_models_batch():
    model = tiny_llava()
    picture = make_image(90, 30, 0)
    examples = [
        make_example(model, picture, [6, 3], [(4, 5), (7, 8)], 5),
        make_example(model, None, [150], [(9, 40)], 6),
    ]
    return model, examples


def logps_of(model, examples):
    packed = packed_of(examples)
    return response_logps(attention.packed_forward(model, packed, **packed_images(model, examples)), packed)[0]


@pytest.mark.parametrize(
    "planted, reason",
    [
        (leaky, "its output differs from SDPA's by"),
        (not_a_number, "its output differs from SDPA's by nan"),
        (failing, "it fails with RuntimeError (no valid triton configs)"),
    ],
)
def test_a_flex_that_is_wrong_is_not_used_and_the_run_says_so(planted, reason, monkeypatch, warned):
    model, examples = the_models_batch()
    attention.enable(model)
    with torch.no_grad():
        expected = logps_of(model, examples)
        monkeypatch.setattr(attention, "_eager_flex", lambda: planted)
        attention.enable(model, "flex")
        for _ in range(2):
            assert torch.equal(logps_of(model, examples), expected)
    (line,) = warned
    assert line.startswith("attention_backend: flex is not used, SDPA serves this run: " + reason) and "\n" not in line


def test_a_wrong_backward_is_found(monkeypatch):
    layout = layout_of(SHAPES[3])
    fault = partial(attention._flex_fault, *states(layout), layout, None)
    monkeypatch.setattr(attention, "_eager_flex", lambda: wrong_backward)
    assert fault(backward=False) == ""
    assert fault(backward=True).startswith("its gradient of keys differs from SDPA's by")
    monkeypatch.setattr(attention, "_eager_flex", lambda: right)
    assert fault(backward=True) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype, monkeypatch, warned):
    for seed, sizes in enumerate(SHAPES[1:]):
        layout = layout_of(sizes)
        assert attention._flex_fault(*states(layout, dtype, seed), layout, None, backward=False) == ""
        monkeypatch.setattr(attention, "_eager_flex", lambda: right)
        assert attention._flex_fault(*states(layout, dtype, seed), layout, None, backward=True) == ""
        monkeypatch.undo()


def test_flex_gets_one_dtype_under_autocast_and_is_measured_by_it(monkeypatch, warned):
    """fp32 queries and keys beside bf16 values, as fp32 weights give them: torch 2.11's backward is wrong on a card."""
    layout = layout_of(SHAPES[3])
    query, key, value = states(layout)
    given = []

    def recording(*made, **options):
        given.append([x.dtype for x in made])
        return right(*made, **options)

    monkeypatch.setattr(attention, "_eager_flex", lambda: recording)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._flex_fault(query, key, value.bfloat16(), layout, None, backward=True) == ""
    assert given == [[torch.bfloat16] * 3]
    given.clear()
    attention._flex_padded(query, key, value, layout, None)
    assert given == [[torch.float32] * 3]


def test_a_full_memory_is_no_fault_of_flex(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "_eager_flex", lambda: full)
    layout = layout_of(SHAPES[0])
    with pytest.raises(torch.OutOfMemoryError):
        attention._flex_attention(*states(layout), layout, None, 0.0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_check_leaves_checkpointing_alone(use_reentrant, monkeypatch, warned):
    """It runs within the first layer's checkpoint, whose second forward has no check and must save the same tensors."""
    model, examples = the_models_batch()
    attention.enable(model)
    expected = gradients(model, orpo_of(logps_of(model, examples), examples))
    calls = []
    monkeypatch.setattr(attention, "_eager_flex", lambda: lambda *a, **k: calls.append(1) or right(*a, **k))
    check = attention._flex_fault
    monkeypatch.setattr(attention, "_flex_fault", lambda *a, backward: check(*a, backward=True))  # as on a GPU
    attention.enable(model, "flex")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    model.model.vision_tower.requires_grad_(False)
    found = gradients(model, orpo_of(logps_of(model, examples), examples))
    assert attention._flex.serves and warned == []
    assert len(calls) == 1 + 2 * 2, "the check, and forward and recomputation of the two layers before the last"
    assert found.keys() == {name for name in expected if "vision_tower" not in name}
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_every_model_that_is_enabled_is_checked_on_its_own_first_batch():
    model, examples = the_models_batch()
    attention.enable(model, "flex")
    assert attention._flex.serves is None
    with torch.no_grad():
        logps_of(model, examples)
    assert attention._flex.serves is True
    attention.enable(model, "flex")
    assert attention._flex.serves is None
    assert logging.getLogger("llamafactory.llava_orpo.step.attention") is attention.logger
