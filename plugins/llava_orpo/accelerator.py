"""What the machine's NVIDIA GPUs can do: asks the driver (NVML), because importing torch takes seconds."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

NVML = ("libnvidia-ml.so.1", "nvml.dll")
CUDA = ("libcuda.so.1", "nvcuda.dll")
BF16_SINCE = (8, 0)  # Ampere
NO_DEVICE = ("", "-1", "NoDevFiles")
# Builds and back ends of torch whose devices NVML does not know.
OTHER_BUILDS = ("rocm", "xpu")
OTHER_BACKENDS = ("torch_npu", "torch_xla", "habana_frameworks", "torch_musa", "torch_mlu", "torch_neuron")


def only_nvidia() -> bool:
    """Whether torch can use no other accelerator than NVIDIA's here, so that NVML's answer is the whole answer."""
    try:
        build = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    other = sys.platform == "darwin" or any(name in build for name in OTHER_BUILDS)
    return not other and not any(importlib.util.find_spec(name) for name in OTHER_BACKENDS)


def compute_capabilities() -> list[tuple[int, int]] | None:
    """(major, minor) of every NVIDIA GPU that this process may use, [] if there is none.

    None means that the answer is not known: there is a CUDA driver, but NVML does not answer (a container may lack it).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in NO_DEVICE:
        return []
    nvml = _library(NVML)
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return None if _library(CUDA) else []
    try:
        found = _capabilities(nvml)
    finally:
        nvml.nvmlShutdown()
    words = visible.split(",") if visible else []
    chosen = [int(word) for word in words if word.strip().isdigit()]
    # A device named by its UUID is not looked up: it is taken to be like the others.
    return [found[i] for i in chosen if i < len(found)] if chosen and len(chosen) == len(words) else found


def _library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _capabilities(nvml: ctypes.CDLL) -> list[tuple[int, int]]:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
            found.append((major.value, minor.value))
    return found
