"""How long calls take on a device: by CUDA graphs, or as they are."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from measure import wall_clock

Call = Callable[[], object]


class Prepared(NamedTuple):
    """What a round times: `run` makes that many calls of a candidate."""

    run: Call
    calls: int


class Clock(Protocol):
    def prepare(self, call: Call, sets: int) -> Prepared:
        """Ready to be timed, over a multiple of as many calls as there are sets of inputs."""

    def seconds(self, prepared: Prepared) -> float:
        """Per call, of one run."""


class GraphClock:
    """The GPU's own time, of replays of a CUDA graph of at least 2 ms. Works on the current stream, which autograd
    must have recorded on too and which cannot be the default one."""

    def prepare(self, call: Call, sets: int) -> Prepared:
        for _ in range(2 * sets):  # what is compiled, chosen or allocated with the first calls cannot be captured
            call()
        prepared = self._capture(call, sets)
        for _ in range(2):  # twice: most of a short graph's time is its start, and what follows from it too short
            prepared.run()
            longer = math.ceil(2e-3 / (self.seconds(prepared) * prepared.calls))
            if longer == 1:
                break
            prepared = self._capture(call, prepared.calls * longer)
        return prepared

    def _capture(self, call: Call, calls: int) -> Prepared:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                call()
        return Prepared(graph.replay, calls)

    def seconds(self, prepared: Prepared) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        prepared.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / prepared.calls


class EagerClock:
    """The time on the wall from the first of the calls until the device has done the last: of calls that together take
    `least_s`, so that it is that of a loop and not of its start, when the device waits for the host."""

    def __init__(self, device: torch.device, least_s: float):
        self._least_s = least_s
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def prepare(self, call: Call, sets: int) -> Prepared:
        def run(calls: int = sets) -> None:
            for _ in range(calls):
                call()
            self._synchronize()

        run()  # what is compiled, chosen or allocated with the first calls
        calls = sets * math.ceil(max(self._least_s / wall_clock(run), 1))
        return Prepared(partial(run, calls), calls)

    def seconds(self, prepared: Prepared) -> float:
        return wall_clock(prepared.run) / prepared.calls
