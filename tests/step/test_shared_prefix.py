"""Shared-prefix rows against the plain path: a forward per sequence, or LLaMA-Factory's padded batch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from helpers.drawn import examples
from helpers.llava import IMAGE_TOKEN, make_example, make_image, packed_images, padded_logps, plain_logps, tiny_llava
from helpers.packed import gradients, orpo_of, packed_of
from helpers.recipes import build_trainer, photo_rows, write_rows
from llava_orpo.step import attention
from llava_orpo.step.attention import choose_backend, choose_cudnn, disable, enable, is_enabled, packed_forward, unwrap
from llava_orpo.step.packing import SharedPrefixLayout, TokenPair, pack, response_logps
from llava_orpo.training import trainer as trainer_module

WIDE, TALL, SMALL, SQUARE = (90, 30), (25, 80), (20, 22), (64, 64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(model):
    """name -> examples; every shape of batch the trainer meets."""
    wide, tall, small, square = (make_image(*size, seed) for seed, size in enumerate((WIDE, TALL, SMALL, SQUARE)))
    return {
        "one pair": [make_example(model, wide, [7], [(9, 5)], 0)],
        "one-token responses": [
            make_example(model, tall, [4], [(1, 1)], 1),
            make_example(model, small, [3], [(1, 6)], 2),
        ],
        "several aspect ratios": [
            make_example(model, image, [5 + i], [(4 + 3 * i, 11 - 2 * i)], i)
            for i, image in enumerate((wide, tall, small, square))
        ],
        "text only": [make_example(model, None, [8], [(5, 2)], 3)],
        "text and image": [
            make_example(model, None, [8], [(5, 2)], 3),
            make_example(model, square, [2], [(3, 4)], 4),
        ],
        "grouped": [
            make_example(model, wide, [6, 3, 0, 9], [(4, 5), (1, 8), (3, 3), (7, 2)], 5, shared_question=2),
            make_example(model, tall, [5], [(2, 6)], 6),
            make_example(model, square, [4, 4], [(6, 6), (5, 1)], 7),
        ],
    }


CASES = list(batches(tiny_llava()))


def shared_logps(model, examples):
    packed = packed_of(examples)
    logits = packed_forward(model, packed, **packed_images(unwrap(model), examples))
    return response_logps(logits, packed)[0]


def assert_same_gradients(ours, reference, tolerance):
    """Relative error of each tensor at most `tolerance`. The floor, 1e-7 of the whole gradient's norm, is for
    CLIP's key biases: softmax ignores a shift of all keys, so their true gradient is 0."""
    assert ours.keys() == reference.keys()
    total = torch.stack([g.norm() for g in reference.values()]).norm()
    assert total > 0.01
    for name, g in reference.items():
        error = (ours[name] - g).norm()
        assert error <= tolerance * g.norm() + 1e-7 * total, f"{name}: {error / g.norm():.2e} relative"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reference", [plain_logps, padded_logps])
def test_loss_and_every_gradient_equal_the_plain_path(case, reference):
    model = tiny_llava()
    examples = batches(model)[case]
    expected = reference(model, examples)
    expected_loss = orpo_of(expected, examples)
    expected_grads = gradients(model, expected_loss)
    enable(model)
    logps = shared_logps(model, examples)
    loss = orpo_of(logps, examples)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, loss), expected_grads, 1e-5)


@pytest.mark.parametrize("case", ["one pair", "several aspect ratios", "grouped"])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_lora_with_and_without_gradient_checkpointing(case, use_reentrant):
    base = tiny_llava()
    examples = batches(base)[case]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: lora_A would get no gradient
            torch.nn.init.normal_(parameter, std=0.2)
    expected = orpo_of(plain_logps(model, examples, text_model=base), examples)
    expected_grads = gradients(model, expected)
    enable(model)
    model.train()
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        base.enable_input_require_grads()
    loss = orpo_of(shared_logps(model, examples), examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours = gradients(model, loss)
    assert ours and all("lora_" in name for name in ours)
    assert_same_gradients(ours, expected_grads, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_full_tuning_with_gradient_checkpointing(use_reentrant):
    model = tiny_llava()
    examples = batches(model)["grouped"]
    expected_grads = gradients(model, orpo_of(plain_logps(model, examples), examples))
    enable(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
        model.model.vision_tower.vision_model.embeddings.register_forward_hook(
            lambda module, args, output: output.requires_grad_(True) if output.is_leaf else output
        )
    ours = gradients(model, orpo_of(shared_logps(model, examples), examples))
    assert_same_gradients(ours, expected_grads, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bf16_within_its_rounding(case):
    """At most 1e-2 from the plain path in bf16, and no further than that path from fp32, same weights."""
    model, exact = (tiny_llava(dtype=torch.bfloat16, scale=2.0) for _ in range(2))
    exact = exact.float()
    examples = batches(exact)[case]
    names = [name for name, _ in exact.named_parameters()]

    def run(llava, logps):
        assert logps.dtype == torch.float32
        loss = orpo_of(logps, examples)
        grads = gradients(llava, loss)
        return loss, torch.cat([grads[name].float().flatten() for name in names if name in grads])

    plain_loss, plain = run(model, plain_logps(model, examples))
    enable(model)
    enable(exact)
    loss, ours = run(model, shared_logps(model, examples))
    _, truth = run(exact, shared_logps(exact, examples))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-2, atol=0)
    assert (ours - plain).norm() < 1e-2 * plain.norm()
    assert (ours - truth).norm() < 1.25 * (plain - truth).norm()


def test_through_ddp(tmp_path):
    """The layout reaches the attention through DistributedDataParallel's argument handling."""
    model = tiny_llava()
    examples = batches(model)["grouped"]
    enable(model)
    expected_grads = gradients(model, orpo_of(shared_logps(model, examples), examples))
    model.model.vision_tower.requires_grad_(False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert is_enabled(wrapped)
        ours = gradients(wrapped, orpo_of(shared_logps(wrapped, examples), examples))
    finally:
        torch.distributed.destroy_process_group()
    expected = {f"module.{n}": g for n, g in expected_grads.items() if "vision_tower" not in n}
    assert_same_gradients(ours, expected, 1e-5)


def test_grouped_equals_ungrouped():
    model = tiny_llava()
    example = make_example(model, make_image(*WIDE, 0), [6, 3, 0], [(4, 5), (1, 8), (3, 3)], 5, shared_question=2)
    enable(model)
    grouped = shared_logps(model, [example])
    alone = [type(example)(image=example.image, pairs=[pair]) for pair in example.pairs]
    ungrouped = shared_logps(model, alone)
    torch.testing.assert_close(grouped, ungrouped, rtol=1e-5, atol=1e-5)
    assert packed_of([example]).num_tokens < packed_of(alone).num_tokens
    ours = gradients(model, orpo_of(grouped, [example]))
    assert_same_gradients(ours, gradients(model, orpo_of(ungrouped, alone)), 1e-5)


def _with_pair(example, index, **changes):
    pairs = list(example.pairs)
    pairs[index] = TokenPair(**{**vars(pairs[index]), **changes})
    return type(example)(image=example.image, pairs=pairs)


def test_responses_do_not_leak():
    model = tiny_llava()
    enable(model)
    example = make_example(model, make_image(*WIDE, 0), [6, 3], [(4, 5), (7, 8)], 5)
    with torch.no_grad():
        before = shared_logps(model, [example])
        other = [(i * 7) % 300 + 10 for i in range(5)]
        same_length = shared_logps(model, [_with_pair(example, 0, rejected_ids=other)])
        longer = shared_logps(model, [_with_pair(example, 0, rejected_ids=other * 3)])
        chosen_changed = shared_logps(model, [_with_pair(example, 0, chosen_ids=other[:4])])
    keep = [0, 1, 3]  # all but the rejected response of pair 0
    assert torch.equal(before[keep], same_length[keep]) and before[2] != same_length[2]
    torch.testing.assert_close(before[keep], longer[keep], rtol=1e-6, atol=1e-5)
    assert torch.equal(before[1:], chosen_changed[1:]) and before[0] != chosen_changed[0]


def test_groups_do_not_leak():
    model = tiny_llava()
    enable(model)
    first, second = (make_example(model, make_image(*WIDE, seed), [5, 2], [(4, 5), (2, 3)], seed) for seed in (0, 1))
    with torch.no_grad():
        before = shared_logps(model, [first, second])
        changed = shared_logps(model, [type(first)(image=make_image(*WIDE, 9), pairs=first.pairs), second])
    assert torch.equal(before[[2, 3, 6, 7]], changed[[2, 3, 6, 7]])
    assert (before[[0, 1, 4, 5]] != changed[[0, 1, 4, 5]]).all()


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_plain_use_is_untouched(base):
    model = tiny_llava(attn_implementation=base).eval()
    example = make_example(model, make_image(*WIDE, 0), [6], [(4, 5)], 5)
    ids = torch.tensor([example.pairs[0].prompt_ids] * 2)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0  # left padding
    images = packed_images(model, [example, example])

    def run():
        generated = model.generate(
            input_ids=ids, attention_mask=mask, **images, max_new_tokens=6, do_sample=False, use_cache=True
        )
        return generated, model(input_ids=ids, attention_mask=mask, **images).logits

    before = run()
    vision = model.config.vision_config._attn_implementation
    assert enable(model) == f"shared_prefix:sdpa:{base}" and is_enabled(model)
    assert model.config.vision_config._attn_implementation == vision == base
    assert model.model.vision_tower.config._attn_implementation == base
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
    assert "attn_implementation" not in str(model.config.to_dict())
    disable(model)
    assert model.config.get_text_config()._attn_implementation == base and not is_enabled(model)
    disable(model)


@pytest.mark.parametrize("whole_last_layer", [False, True])
def test_attention_dropout_is_that_of_the_model(monkeypatch, whole_last_layer):
    if whole_last_layer:
        monkeypatch.setattr("llava_orpo.step.last_layer.SERVED", ())
    model = tiny_llava(attention_dropout=0.5)
    example = make_example(model, None, [4], [(3, 5)], seed=1)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return packed_forward(model, packed_of([example]))

    enable(model)
    model.train()
    assert torch.equal(run(0), run(0)) and not torch.allclose(run(0), run(1), rtol=0.01)
    model.eval()
    assert torch.equal(run(0), run(1))


def test_base_implementation_runs_under_its_own_name():
    """flash_attention_forward picks its kernel by the name in the module's config."""
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, "shared_prefix_layout" in kwargs))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("flash_probe", probe)
    model = tiny_llava()
    model.config.get_text_config()._attn_implementation = "flash_probe"
    name = enable(model)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [("flash_probe", False)] * 3
    assert model.config.get_text_config()._attn_implementation == name


class _SquareTensors(TorchDispatchMode):
    """Collects operator results whose last two dimensions both reach `length`."""

    def __init__(self, length):
        super().__init__()
        self.length, self.square = length, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() >= 2 and min(x.shape[-2:]) >= self.length:
                self.square.append((str(func), tuple(x.shape)))
        return out


def test_no_square_mask_or_score_matrix():
    model = tiny_llava()
    examples = [make_example(model, make_image(*SQUARE, 0), [400], [(30, 20)], 0)]
    packed, images = packed_of(examples), packed_images(model, examples)
    length = sum(packed.layout.groups[0][:1])
    assert length > 400 > model.config.text_config.vocab_size
    with _SquareTensors(length) as spy, torch.no_grad():
        model(input_ids=packed.input_ids, position_ids=packed.position_ids, **images, use_cache=False)
    assert spy.square  # it does see the mask transformers makes of restarting position ids
    enable(model)
    with _SquareTensors(length) as spy:
        packed_forward(model, packed, **images).sum().backward()
    assert not spy.square


def test_flex_forward_equals_sdpa():
    model = tiny_llava()
    examples = batches(model)["grouped"] + [make_example(model, None, [150], [(20, 140)], 11)]
    enable(model, "sdpa")
    with torch.no_grad():
        expected = shared_logps(model, examples)
        assert enable(model, "flex") == "shared_prefix:flex:sdpa"
        torch.testing.assert_close(shared_logps(model, examples), expected, rtol=1e-5, atol=1e-5)
    assert attention._flex.serves, "SDPA did not take its place"


def test_choose_backend():
    assert choose_backend("cpu")[0] == "sdpa" and "cpu" in choose_backend("cpu")[1]
    assert choose_backend("cuda:0", "flex")[0] == "flex"
    assert choose_backend("cpu", "sdpa")[0] == choose_backend("cuda", "sdpa")[0] == "sdpa"
    with pytest.raises(ValueError, match="no backward"):
        choose_backend("cpu", "flex")
    with pytest.raises(ValueError, match="unknown"):
        choose_backend("cpu", "fast")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_cudnn_is_off_where_it_would_be_first(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert choose_cudnn("cpu") == "" and torch.backends.cuda.cudnn_sdp_enabled() == before
    try:
        for wanted in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(not wanted)
            line = choose_cudnn("cuda:0", wanted)
            decided = capability[0] in (9, 10)
            assert torch.backends.cuda.cudnn_sdp_enabled() == (wanted if decided else not wanted)
            assert ("is on" if wanted else "is off") in line if decided else line == ""
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_key_for_cudnn_reaches_the_step_and_is_logged_once(tmp_path, monkeypatch):
    asked, logged = [], []
    monkeypatch.setattr(attention, "choose_cudnn", lambda device, wanted: asked.append(wanted) or "the line on cuDNN")
    monkeypatch.setattr(trainer_module.logger, "info_rank0", logged.append)
    write_rows(tmp_path, photo_rows(1, 1))
    build_trainer(tmp_path, {"finetuning_type": "lora", "lora_target": "q_proj", "cudnn_attention": True})
    assert asked == [True] and sum("the line on cuDNN" in line for line in logged) == 1


def test_refusals():
    with pytest.raises(ValueError, match="sliding window of 64"):
        enable(tiny_llava(sliding_window=64))
    text = tiny_llava().model.language_model
    with pytest.raises(ValueError, match="llava_next"):
        enable(text)
    assert enable(text, text_only=True)
    layered = tiny_llava()
    layered.config.get_text_config().layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        enable(layered)
    model = tiny_llava()
    one, two = (make_example(model, None, [4 + i], [(2, 3)], i) for i in range(2))
    packed = packed_of([one])
    with pytest.raises(ValueError, match="enable"):
        packed_forward(model, packed)
    enable(model)
    with pytest.raises(ValueError, match="do not belong together"):
        model(input_ids=packed.input_ids, shared_prefix_layout=packed_of([two]).layout)
    with pytest.raises(ValueError, match="rows of logits"):
        response_logps(torch.zeros(2, 320), packed)


@pytest.mark.parametrize(
    "text, reason",
    [
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding window of 64"),
        ({"sliding_window": 64, "use_sliding_window": False}, ""),  # as Qwen2's configs have it
        ({"layer_types": ["full_attention"] * 3}, ""),
        ({"attn_logit_softcapping": 50.0}, "caps its logits"),
    ],
)
def test_only_full_causal_attention_is_taken_over(text, reason):
    model = tiny_llava(**text)
    if reason:
        with pytest.raises(ValueError, match=reason):
            enable(model)
    else:
        enable(model)
    assert is_enabled(model) == (not reason)


@pytest.mark.parametrize("option", ["sliding_window", "softcap", "s_aux"])
def test_an_option_that_arrives_with_the_call_is_refused(option):
    """What a modeling file hands over without its config saying so."""
    packed = pack([[TokenPair([1, 2], [3], [4])]])
    attend = AttentionInterface()[enable(tiny_llava())]
    states = [torch.zeros(1, heads, packed.num_tokens, 16) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match=f"cannot serve {option}=7"):
        attend(None, *states, None, shared_prefix_layout=packed.layout, **{option: 7})
    output, weights = attend(None, *states, None, shared_prefix_layout=packed.layout, **{option: None})
    assert output.shape == (1, packed.num_tokens, 4, 16) and weights is None


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("queries, keys", [((2, 0), 0), ((1, 1), 0), ((1, -1), 0), ((1, 0), 1), ((1, 0), -1)])
def test_states_of_another_batch_are_refused(queries, keys, read_only):
    packed = pack([[TokenPair([1, 2], [3, 5], [4])]])
    attend = AttentionInterface()[enable(tiny_llava())]
    rows, more = queries
    tokens = (len(packed.layout.read.positions) if read_only else packed.num_tokens) + more
    states = [torch.zeros(rows, 4, tokens, 16), *(torch.zeros(rows, 2, packed.num_tokens + keys, 16) for _ in range(2))]
    with pytest.raises(ValueError, match="do not belong together"):
        attend(None, *states, None, shared_prefix_layout=packed.layout, shared_prefix_read_only=read_only)


def test_an_unknown_backend_changes_nothing():
    model = tiny_llava()
    with pytest.raises(ValueError, match="unknown shared-prefix attention 'fast'"):
        enable(model, "fast")
    assert not is_enabled(model)


def test_flex_refuses_the_dropout_it_does_not_have():
    model = tiny_llava(attention_dropout=0.5)
    packed = packed_of([make_example(model, None, [4], [(3, 5)], seed=1)])
    enable(model, "flex")
    with torch.no_grad():
        assert packed_forward(model.eval(), packed).isfinite().all()
        with pytest.raises(ValueError, match="has no dropout, the model asks for 0.5"):
            packed_forward(model.train(), packed)


def test_a_decoder_with_its_own_copy_of_the_config_is_served_too():
    model = tiny_llava()
    example = make_example(model, None, [4], [(3, 5)], seed=1)
    expected = plain_logps(model, [example])
    decoder = model.get_decoder()
    decoder.config = copy.deepcopy(decoder.config)
    for layer in decoder.layers:
        layer.self_attn.config = decoder.config
    enable(model)
    torch.testing.assert_close(shared_logps(model, [example]), expected, rtol=1e-5, atol=1e-5)
    disable(model)
    assert decoder.config._attn_implementation == model.config.get_text_config()._attn_implementation == "sdpa"


def test_response_logps_gradient_and_chunks():
    torch.manual_seed(0)
    groups = [[TokenPair([1, 2], list(range(10, 90)), list(range(20, 85)))]]
    packed = pack(groups)
    logits = (torch.randn(1, 145, 100, dtype=torch.float64) * 5).requires_grad_()
    weights = torch.randn(2, dtype=torch.float64)
    sums, lengths = response_logps(logits, packed)
    expected = logits[0].log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
    expected = torch.stack([expected[:80].sum(), expected[80:].sum()])
    torch.testing.assert_close(sums, expected)
    assert lengths.tolist() == [80, 65]
    (ours,) = torch.autograd.grad((sums * weights).sum(), logits)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), logits)[0])
    half = logits.detach().bfloat16().requires_grad_()
    sums, _ = response_logps(half, packed)
    sums.sum().backward()
    assert sums.dtype == torch.float32 and half.grad.dtype == torch.bfloat16


tokens = st.lists(st.integers(5, 7), min_size=1, max_size=5)
drawn_groups = st.lists(
    st.lists(st.builds(TokenPair, prompt_ids=tokens, chosen_ids=tokens, rejected_ids=tokens), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@examples(100)
@given(drawn_groups)
def test_pack_invariants(groups):
    packed = pack(groups)
    layout, ids, positions = packed.layout, packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    pairs = [pair for group in groups for pair in group]
    # Segments cover the row exactly, parents come first, positions continue from the parent's end.
    assert [s.start for s in layout.segments] == [0] + [s.stop for s in layout.segments[:-1]]
    assert layout.segments[-1].stop == len(ids) == layout.num_tokens == packed.num_tokens
    for index, segment in enumerate(layout.segments):
        assert segment.stop > segment.start and segment.parent < index
        expected = 0 if segment.parent < 0 else positions[layout.segments[segment.parent].stop - 1] + 1
        count = segment.stop - segment.start
        assert positions[segment.start : segment.stop] == list(range(expected, expected + count))
    # What a token may see, in order, is exactly the plain sequence up to it.
    end = layout.subtree_end.tolist()
    context = [[ids[j] for j in range(i + 1) if i < end[j]] for i in range(len(ids))]
    full = [list(p.prompt_ids) + list(p.chosen_ids) for p in pairs]
    full += [list(p.prompt_ids) + list(p.rejected_ids) for p in pairs]
    answers = [list(p.chosen_ids) for p in pairs] + [list(p.rejected_ids) for p in pairs]
    assert packed.n_pairs == len(pairs) and packed.lengths.tolist() == [len(a) for a in answers]
    assert list(packed.response_lengths) == packed.lengths.tolist()
    at = 0
    for sequence, answer in zip(full, answers, strict=True):
        prompt = len(sequence) - len(answer)
        for offset, token in enumerate(answer):
            position, target = packed.logits_to_keep[at].item(), packed.targets[at].item()
            assert target == token
            assert context[position] == sequence[: prompt + offset]
            assert positions[position] == prompt + offset - 1
            at += 1
    assert at == len(packed.targets) == len(packed.logits_to_keep)
    assert len(ids) <= sum(map(len, full))
    # The attention's two forms of the same rule.
    start = 0
    for (root, tail), mask in zip(layout.groups, layout.tail_masks(torch.float32), strict=True):
        seen = mask[0, 0] == 0
        assert seen.shape == (tail, root + tail) and seen[:, :root].all()
        rows = range(start + root, start + root + tail)
        assert seen.tolist() == [[j <= i < end[j] for j in range(start, start + root + tail)] for i in rows]
        start += root + tail
    assert layout.tail_masks(torch.float32)[0] is layout.tail_masks(torch.float32)[0]


@examples(30)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4))
def test_block_mask_shows_exactly_what_the_layout_says(sizes):
    layout = pack([[TokenPair([1] * p, [2] * c, [3] * r)] for p, c, r in sizes]).layout
    block_mask, length = layout.block_mask(), layout.num_tokens
    end = layout.subtree_end
    i, j = torch.arange(length)[:, None], torch.arange(length)
    allowed = (j <= i) & (i < end)
    visible, covered = block_mask.mask_mod(0, 0, i, j), torch.zeros(length, length, dtype=torch.bool)
    for kind, num, indices in (
        ("partial", block_mask.kv_num_blocks, block_mask.kv_indices),
        ("full", block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        for q, count in enumerate(num[0, 0].tolist()):
            for k in indices[0, 0, q, :count].tolist():
                area = (slice(q * 128, (q + 1) * 128), slice(k * 128, (k + 1) * 128))
                covered[area] = visible[area] if kind == "partial" else True
    assert torch.equal(covered, allowed)


def test_block_mask_leaves_out_what_no_query_can_see():
    """Two groups of two blocks each: nothing above the diagonal, no other group, and whole blocks need no mask."""
    block_mask = pack([[TokenPair([1] * 128, [2] * 64, [3] * 64)]] * 2).layout.block_mask()

    def listed(num, indices):
        return [indices[0, 0, query, :count].tolist() for query, count in enumerate(num[0, 0].tolist())]

    assert listed(block_mask.kv_num_blocks, block_mask.kv_indices) == [[0], [1], [2], [3]]
    assert listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices) == [[], [0], [], [2]]


def test_equal_prompts_share_their_question():
    pairs = [TokenPair([1, 2, 3], [4], [5]), TokenPair([1, 9], [4], [5]), TokenPair([1, 2, 3], [6], [7])]
    packed = pack([pairs])
    assert packed.layout.groups == ((1, 9),)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9, 4, 5]]
    assert packed.targets.tolist() == [4, 4, 6, 5, 5, 7]  # chosen of pairs 0, 1, 2, then rejected
    assert packed.logits_to_keep.tolist() == [2, 7, 2, 2, 7, 2]


def test_pack_refuses():
    with pytest.raises(ValueError, match="group 1, pair 0: rejected_ids"):
        pack([[TokenPair([1], [2], [3])], [TokenPair([1], [2], [])]])
    with pytest.raises(ValueError, match="prompt_ids"):
        pack([[TokenPair([], [2], [3])]])
    with pytest.raises(ValueError, match="group 0 holds no pair"):
        pack([[]])
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])
    with pytest.raises(ValueError, match="group 0, pair 0: image token in rejected_ids"):
        pack([[TokenPair([1], [2], [8, IMAGE_TOKEN])]], IMAGE_TOKEN)
    image_after_question = [TokenPair([1, 5, IMAGE_TOKEN], [2], [8]), TokenPair([1, 6, IMAGE_TOKEN], [2], [8])]
    with pytest.raises(ValueError, match="group 0, pair 0: image tokens"):
        pack([image_after_question], IMAGE_TOKEN)
    packed = pack([image_after_question[:1], image_after_question[1:]], IMAGE_TOKEN)
    assert packed.num_image_tokens == 2


def test_moving_a_batch_moves_the_layout():
    packed = pack([[TokenPair([1, 2], [3], [4, 5])]])
    packed.layout.tail_masks(torch.float32)
    meta = packed.to("meta", non_blocking=True)
    assert {meta.input_ids.device.type, meta.targets.device.type, meta.layout.subtree_end.device.type} == {"meta"}
    assert meta.layout.tail_masks(torch.float32)[0].device.type == "meta"
    assert packed.input_ids.device.type == "cpu" and meta.response_lengths == (1, 2)
    assert isinstance(meta.layout, SharedPrefixLayout)
