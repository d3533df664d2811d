"""Events of a GPU as torch.profiler exports them: what a device was told to run, and when."""

from typing import Any

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ALL_GATHER = "void ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SEND_RECV = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": args.get("stream", 1), "ts": ts, "dur": dur} | {
        "args": args
    }


class Device:
    """A device that runs what it is told behind a barrier, over 43 us after `base`, when the host needs 3 more to go
    on; stamps are as large as real ones.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]
        self.correlation = 0
        self.base = 5_512_345_678_901.25
        self.run("void at::native::fill_kernel()", 0, 2, stream=7)
        self.run(ALL_REDUCE, 3, 40, stream=7)
        self.host("cudaDeviceSynchronize", 4, 42)

    def host(self, name: str, at: float, took: float, **args: Any) -> None:
        self.events.append(event("cuda_runtime", name, self.base + at, took, **args))

    def run(self, name: str, at: float, took: float, *, stream: int, launched: float | None = None) -> None:
        """A kernel at some microseconds; launched 3 us ahead, or when it is said."""
        self.correlation += 1
        self.host("cudaLaunchKernel", at - 3 if launched is None else launched, 1, correlation=self.correlation)
        args = {"stream": stream, "device": 0, "correlation": self.correlation}
        self.events.append(event("kernel", name, self.base + at, took, **args))

    def graph(self, kernels: list[tuple[str, float, float]], launched: float, stream: int) -> None:
        """A replayed graph: its kernels share one launch."""
        self.correlation += 1
        self.host("cudaGraphLaunch", launched, 2, correlation=self.correlation)
        for name, at, took in kernels:
            args = {"stream": stream, "device": 0, "correlation": self.correlation, "graph node id": 1}
            self.events.append(event("kernel", name, self.base + at, took, **args))
