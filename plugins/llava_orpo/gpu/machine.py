"""Where a GPU run happens: the device, what is installed, the time left, and a clock that waits for the card."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tiny.shapes import GEOMETRIES, Geometry
from .record import LeftOut, Unmeasured

SMALLEST = Geometry((64, 128, 2, 4, 2), (32, 64, 3, 2), tile=56)


@dataclass
class Machine:
    """device: "cuda" or, in a dry run, "cpu". full: LLaMA-Factory is there and wanted. deadline: of stages 1 to 3."""

    device: torch.device
    dry_run: bool = False
    full: bool = True
    deadline: float = float("inf")
    shared: dict[str, Any] = field(default_factory=dict)  # the model that the last measurement left on the device

    @classmethod
    def of(cls, dry_run: bool, core: bool, minutes: float) -> Machine:
        """This machine. core: leave LLaMA-Factory out although it is installed."""
        device = torch.device("cpu" if dry_run else "cuda:0")
        return cls(device, dry_run, not core and installed("llamafactory"), time.monotonic() + 60 * minutes)

    @property
    def geometry(self) -> Geometry:
        """The model of stages 2 and 3."""
        return SMALLEST if self.dry_run else GEOMETRIES["7b"]

    def in_time(self, needs: float = 0.0) -> None:
        """Raises LeftOut when fewer than `needs` seconds are left."""
        if time.monotonic() + needs > self.deadline:
            raise LeftOut("the time is up; --minutes gives more")

    def on_cuda(self, what: str) -> None:
        """Raises Unmeasured on a CPU."""
        if self.device.type != "cuda":
            raise Unmeasured(f"{what}: not measured on a CPU")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Seconds of one call, the card's work included."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
