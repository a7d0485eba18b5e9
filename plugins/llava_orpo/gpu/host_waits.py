"""What would make the host wait for a GPU, counted on a CPU: reads of a tensor's values, and copies of host data.

Needs torch alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# operators whose result, or whose size, depends on values; of `index` only boolean ones
READING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put}
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__")
MADE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.asarray)
INSIDE = (
    __file__,
    "torch/_tensor.py",
    "torch/utils/_python_dispatch.py",
    "torch/utils/_contextlib.py",
    "torch/_ops.py",
)
INSIDE += ("torch/overrides.py", "contextlib.py", "unittest/mock.py")


class Waits:
    """Counts by place ("file function") and kind; nothing while `paused`."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._off = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def note(self, what: str) -> None:
        if self._off:
            return
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(INSIDE):
            frame = frame.f_back
        parts = Path(frame.f_code.co_filename).parts
        parts = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-2:]
        self.found[f"{'/'.join(parts)} {frame.f_code.co_name}", what] += 1

    def places(self) -> dict[str, int]:
        """{place: count}, whatever the kind."""
        return {place: sum(n for (p, _), n in self.found.items() if p == place) for place, _ in self.found}

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        """Counts inside, in this thread and on it alone."""
        with ExitStack() as stack:
            for name in METHODS:
                counted = self._counted(name, getattr(torch.Tensor, name))
                stack.enter_context(mock.patch.object(torch.Tensor, name, counted))
            stack.enter_context(_Operators(self))
            stack.enter_context(_Functions(self))
            yield self

    def _counted(self, name: str, method):
        def counted(tensor, *args, **kwargs):
            self.note(name)
            with self.paused():  # its own operators are the same wait
                return method(tensor, *args, **kwargs)

        return counted


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func._overloadpacket
        reads = packet in READING
        if packet in INDEXING:
            reads = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if reads:
            self.waits.note(str(packet))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Host data made into a tensor on a named device: on a GPU a copy that waits."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MADE and not isinstance(args[0], torch.Tensor) and (kwargs.get("device") is not None or types):
            self.waits.note(func.__name__)
        return func(*args, **kwargs)
