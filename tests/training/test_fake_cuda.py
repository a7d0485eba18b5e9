"""The trainer's step on fake CUDA tensors, without a driver: no tensor stays on the CPU, and no two dtypes meet.

Fake tensors have a device, a dtype and a shape, but no data. Two things need a driver and are put aside: whether
autocast is available, and which attention kernel SDPA takes (those of trace.py are called by name). Autograd's engine
asks the driver for its context, so backward runs on fake CPU tensors.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import accelerate.utils
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.llava import IMAGE_TOKEN, make_example, make_image, packed_images, tiny_llava
from llava_orpo.plan import trace
from llava_orpo.step import attention
from llava_orpo.step import model as step_model
from llava_orpo.step.packing import pack
from llava_orpo.training.anomalies import Anomalies
from llava_orpo.training.objective import Objective
from llava_orpo.training.trainer import SharedPrefixTrainer
from llava_orpo.training.undamaged import Undamaged

BF16 = torch.bfloat16
TARGETS = r".*language_model.*_proj|.*linear_[12]"
# The images' lengths, which upstream would make on the device and nobody reads (upstream.ListsOnHost).
ON_CPU = {"upstream.py __torch_function__ aten.lift_fresh.default": 1}
# CUDA's autocast has layer norms in float32, and CLIP's residual starts with one: two sums in each layer that is read.
MIXED = {"modeling_clip.py forward aten.add.Tensor": 4}
MIXING = {torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.div, torch.ops.aten.cat}
MIXING |= {torch.ops.aten.add_, torch.ops.aten.mul_, torch.ops.aten.index_copy, torch.ops.aten.where}


class Seen(TorchDispatchMode):
    """Operators with a tensor on the CPU, and those that take two float dtypes, by the function that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.devices: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = given + [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.devices.update(t.device.type for t in tensors)
        if any(t.device.type == "cpu" and t.numel() for t in tensors):
            self.on_cpu[f"{self._caller()} {func}"] += 1
        floats = {t.dtype for t in given if t.is_floating_point() and t.dim()}
        if func._overloadpacket in MIXING and len(floats) > 1:
            self.mixed[f"{self._caller()} {func}"] += 1
        return out

    @staticmethod
    def _caller() -> str:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"


def attend(query, key, value, attn_mask=None, **options):
    assert query.dtype == key.dtype == value.dtype
    assert attn_mask is None or attn_mask.dtype == query.dtype
    return trace._cuda_attention(query, key, value, attn_mask=attn_mask, **options)


@pytest.fixture(autouse=True)
def without_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))


def made(quantized: bool):
    """(model as LLaMA-Factory makes one for QLoRA or LoRA in bf16, two groups on images and one without, inputs)."""
    model = tiny_llava(dtype=BF16).requires_grad_(False)
    images = [make_image(90, 30, 0), make_image(20, 22, 1)]
    examples = [make_example(model, image, [5, 3], [(4, 6), (2, 2)], seed) for seed, image in enumerate(images)]
    examples.insert(1, make_example(model, None, [4], [(3, 2)], 9))
    inputs = packed_images(model, examples)
    # each image once more, in the place of its damaged one
    inputs = {"pixel_values": inputs["pixel_values"].float(), "image_sizes": inputs["image_sizes"].tolist()}
    inputs = {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1, 1), "image_sizes": inputs["image_sizes"] * 2}
    if quantized:
        trace._quantize(model, trace.Setting())
    from llamafactory.model.model_utils.checkpointing import prepare_model_for_training

    flags = dict(upcast_layernorm=False, disable_gradient_checkpointing=False, use_unsloth_gc=False)
    prepare_model_for_training(model, SimpleNamespace(**flags, use_reentrant_gc=False, upcast_lmhead_output=False))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    step_model.prepare(model, "cuda")
    groups = [example.pairs for example in examples]
    return model, pack(groups, IMAGE_TOKEN, [(0, range(len(groups[0]))), (2, range(len(groups[2])))]), inputs


def moved(model, mode: FakeTensorMode, device: str) -> None:
    """Puts every parameter and buffer of a model on a fake device."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                fake = mode.from_tensor(tensor).detach().to(device)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for name, tensor in module._buffers.items():
            module._buffers[name] = tensor if tensor is None else mode.from_tensor(tensor).to(device)


def run(device: str, quantized: bool, backward: bool = False) -> tuple[Seen, torch.Tensor, torch.nn.Module]:
    """One micro-batch of the real trainer on a fake device: what was seen, the loss, the model."""
    model, packed, inputs = made(quantized)
    trainer = object.__new__(SharedPrefixTrainer)
    trainer.args = SimpleNamespace(device=torch.device(device), world_size=1)
    trainer.plugin = None
    trainer.loss_type, trainer.beta, trainer.ftx_gamma, trainer._tower_frozen = "orpo", 0.1, 0.0, True
    trainer.objective, trainer.undamaged = Objective("orpo", 0.1, image_preference=0.5), Undamaged()
    trainer.finetuning_args = SimpleNamespace(use_ref_model=False)
    trainer._anomalies, trainer._bad_images, trainer._sums = Anomalies(5), set(), {}
    trainer.current_gradient_accumulation_steps = 2
    mode, seen = FakeTensorMode(allow_non_fake_inputs=False), Seen()
    with mode, mock.patch.object(F, "scaled_dot_product_attention", attend):
        moved(model, mode, device)
        inputs["pixel_values"] = mode.from_tensor(inputs["pixel_values"])
        weights = mode.from_tensor(torch.ones(packed.n_pairs))
        rows = [{"dataset": "d", "pair_id": str(i)} for i in range(packed.n_pairs)]
        batch = {"packed": trace._faked(packed, mode), "image_inputs": inputs, "weights": weights}
        batch = accelerate.utils.send_to_device({**batch, "rows": rows, "bad_images": []}, device, non_blocking=True)
        trainer._pairs_in_step = batch["weights"].sum()
        outputs = []
        for layer in attention.unwrap(model).get_decoder().layers:
            layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        with seen, torch.autocast(device, BF16):
            loss = trainer.compute_loss(model, batch)
            trainer._anomalies.any_loss(trainer.args.device)
            trainer._total = lambda sums: torch.stack(list(sums.values()))
            trainer._total(trainer._sums["train"])
        outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        assert {(output.dtype, output.device.type) for output in outputs} == {(BF16, device)}
        if backward:
            with seen:
                loss.backward()
    return seen, loss, model


def check(seen: Seen) -> None:
    assert seen.on_cpu == ON_CPU and seen.mixed == MIXED, (seen.on_cpu, seen.mixed)


@pytest.mark.parametrize("quantized", [True, False], ids=["NF4", "bf16"])
def test_nothing_stays_on_the_cpu_and_no_dtypes_meet(quantized):
    seen, loss, _ = run("cuda", quantized)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert seen.devices["cuda"] > 1000
    check(seen)


def test_backward_on_fake_cpu_tensors_gives_float32_gradients():
    seen, _, model = run("cpu", quantized=True, backward=True)
    assert seen.mixed == {}
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_planted_cpu_tensor_is_found(monkeypatch):
    scored = step_model.response_logps

    def planted(logits, packed):
        torch.arange(3)
        return scored(logits, packed)

    monkeypatch.setattr(step_model, "response_logps", planted)
    with pytest.raises(AssertionError, match="test_fake_cuda.py planted aten.arange"):
        check(run("cuda", quantized=False)[0])


def test_embeddings_of_another_dtype_are_found(monkeypatch):
    """What the published checkpoint would be under bf16 without one dtype for the whole model."""

    make = tiny_llava

    def mixed(**options):
        model = make(**options)
        model.get_input_embeddings().half()
        return model

    monkeypatch.setattr(sys.modules[__name__], "tiny_llava", mixed)
    with pytest.raises(AssertionError, match="torch.float32"):
        check(run("cuda", quantized=False)[0])
