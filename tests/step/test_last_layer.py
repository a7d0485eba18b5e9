"""The last layer at the read rows only: the same numbers, and really less work."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.llava import make_example, make_image, packed_images, tiny_llava
from helpers.packed import gradients, orpo_of, packed_of
from llava_orpo.step import last_layer
from llava_orpo.step.attention import disable, enable, packed_forward
from llava_orpo.step.packing import TokenPair, pack, response_logps


def examples_of(model):
    return [
        make_example(model, make_image(90, 30, 0), [6, 3], [(4, 5), (1, 8)], 0, shared_question=2),
        make_example(model, None, [8], [(5, 2)], 1),
        make_example(model, make_image(64, 64, 1), [5], [(9, 7)], 2),
    ]


def run(model, examples):
    packed = packed_of(examples)
    logps = response_logps(packed_forward(model, packed, **packed_images(model, examples)), packed)[0]
    return logps.detach(), gradients(model, orpo_of(logps, examples))


def rows_through_mlp(model, layer: int, action) -> list[int]:
    seen: list[int] = []
    handle = model.get_decoder().layers[layer].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    action()
    handle.remove()
    return seen


def test_equals_the_whole_last_layer(monkeypatch):
    model = tiny_llava()
    examples = examples_of(model)
    enable(model)
    logps, grads = run(model, examples)
    with monkeypatch.context() as patch:
        patch.setattr(last_layer, "SERVED", ())
        enable(model)  # every row through every layer
        whole_logps, whole_grads = run(model, examples)
    torch.testing.assert_close(logps, whole_logps, rtol=1e-5, atol=1e-5)
    assert grads.keys() == whole_grads.keys()
    total = torch.stack([g.norm() for g in whole_grads.values()]).norm()
    for name, g in whole_grads.items():
        assert (grads[name] - g).norm() <= 1e-5 * g.norm() + 1e-7 * total, name


def test_only_read_positions_pass_the_last_layer_and_a_copy_does_the_same():
    model = tiny_llava()
    examples = examples_of(model)
    packed = packed_of(examples)
    enable(model)
    for each in (model, copy.deepcopy(model)):
        last = rows_through_mlp(each, -1, lambda each=each: run(each, examples))
        assert last == [len(packed.logits_to_keep.unique())]
        assert rows_through_mlp(each, -2, lambda each=each: run(each, examples)) == [packed.num_tokens]


def test_plain_forward_and_disable_run_every_row():
    model = tiny_llava()
    ids = torch.tensor([[5, 6, 7, 8]])
    enable(model)
    enable(model)  # twice is once
    assert rows_through_mlp(model, -1, lambda: model(input_ids=ids)) == [4]
    packed = packed_of(examples_of(model))
    disable(model)
    assert not model.get_decoder().layers[-1]._forward_pre_hooks
    with pytest.raises(ValueError, match="enable"):
        packed_forward(model, packed)


def test_read_positions():
    # group 0: prompt 1 2 | 10 11 12 | 20; group 1: prompt 1 2 3 | 30 31 | 40 41
    packed = pack([[TokenPair([1, 2], [10, 11, 12], [20])], [TokenPair([1, 2, 3], [30, 31], [40, 41])]])
    read = packed.layout.read
    assert read.positions.tolist() == [1, 2, 3, 8, 9, 11] and read.counts == (3, 3)
    assert torch.equal(read.positions[read.index], packed.logits_to_keep)
    masks = packed.layout.read_masks(torch.float32)
    assert [mask.shape for mask in masks] == [(1, 1, 3, 6), (1, 1, 3, 7)]
    seen = [(mask[0, 0] == 0).int().tolist() for mask in masks]
    assert seen[0] == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert seen[1] == [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0]]
    moved = packed.to("meta").layout.read
    assert moved.positions.device.type == moved.index.device.type == "meta"


def test_sharded_weights_are_gathered_first():
    """FSDP2 keeps a layer's weights sharded until the layer's own pre-forward; ours has to come after it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = tiny_llava()
    examples = examples_of(model)
    enable(model)
    want, grads = run(model, examples)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model.zero_grad()
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        got, sharded = run(model, examples)
        assert torch.equal(got, want)
        for name, gradient in grads.items():
            torch.testing.assert_close(sharded[name].full_tensor(), gradient, rtol=1e-6, atol=1e-8)
    finally:
        dist.destroy_process_group()
