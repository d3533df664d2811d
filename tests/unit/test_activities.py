"""Which of a device's activities communicate, and which collective each is; on events as torch.profiler has them."""

import ast
import random
from pathlib import Path

import pytest
from device_fixture import ALL_GATHER, ALL_REDUCE, SEND_RECV, Device, event

import headgrid
from headgrid.experiment.breakdown.activities import PEERS, carried_by, matched, recorded, short_name

ANY = {"send", "recv", "all_to_all", "all_gather", "reduce_scatter"}
NAMES: dict[str, set[str] | None] = {
    ALL_REDUCE: {"all_reduce"},
    "ncclDevKernel_AllReduce_Sum_bf16_TREE_LL128(ncclDevKernelArgsStorage<4096ul>)": {"all_reduce"},
    "ncclSymkDevKernel_AllReduce_AGxLL_R_sum_f16(ncclSymkDevWorkArgs4K)": {"all_reduce"},
    "ncclKernel_AllReduce_RING_LL_Sum_half(ncclDevComm*, unsigned long, ncclWork*)": {"all_reduce"},
    ALL_GATHER: {"all_gather"},
    "ncclDevKernel_ReduceScatter_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": {"reduce_scatter"},
    SEND_RECV: ANY,
    "ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)": set(),
    "Memcpy PtoP (Device -> Device)": set(),
    "sum_add_norm": {"all_reduce"},
    "to_rows": {"all_to_all"},
    "to_channels": {"all_to_all"},
    "to_all": {"all_gather"},
    "to_keys": {"all_gather"},
    "merge_parts": {"all_to_all"},
    "Memcpy DtoD (Device -> Device)": None,
    "Memset (Device)": None,
    "split_kv": None,
    "to_rows_of_a_table": None,
    "nvjet_hsh_192x192_64x4_2x1_v_bz_coopA_TNN": None,
    "void at::native::vectorized_elementwise_kernel<4, at::native::AllReduceFunctor>(int)": None,
    "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm>(Params)": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_tell_what_communicates(name: str) -> None:
    found, expected = carried_by(name), NAMES[name]
    assert found == (None if expected is None else frozenset(expected))


def kernels_that_meet(source: str) -> set[str]:
    """Names of the functions that call `meet`: those read the memory of other ranks."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "meet"
    }


def test_every_kernel_that_reads_from_peers_is_known() -> None:
    source = (Path(headgrid.__file__).parent / "runtime/kernels/peers_triton.py").read_text(encoding="utf-8")
    assert kernels_that_meet(source) == set(PEERS)
    assert kernels_that_meet(source + "\ndef another():\n    meet(1, 2)\n") != set(PEERS)


def test_the_barrier_is_left_out_and_time_begins_when_the_host_goes_on() -> None:
    device = Device()
    device.run("gemm", 60, 10, stream=7)
    device.run(ALL_REDUCE, 70, 5, stream=7)
    device.host("cudaDeviceSynchronize", 61, 20)
    random.Random(1).shuffle(device.events)
    found = recorded(device.events, alone=False)
    assert found.begun - found.origin == 3_000
    assert [(a.name, a.start - found.origin, a.end - found.origin) for a in found.activities] == [
        ("gemm", 17_000, 27_000),
        (ALL_REDUCE, 27_000, 32_000),
    ]
    bare = [each for each in device.events if each["name"] != "cudaDeviceSynchronize"]
    by_name = recorded(bare, alone=False)
    assert by_name.activities == found.activities, "by the first communication where no wait was recorded"
    assert by_name.begun == by_name.origin == found.origin


def test_a_rank_alone_has_no_barrier_on_its_device() -> None:
    events = [event("kernel", "gemm", 100, 10, stream=7), event("gpu_memcpy", "Memcpy DtoD", 120, 5, stream=7)]
    found = recorded(events, alone=True)
    assert len(found.activities) == 2 and found.begun == found.origin == 100_000
    assert recorded([], alone=True).activities == []


def test_collectives_are_matched_by_their_issue_across_streams_and_graphs() -> None:
    """A prefetch is issued before, and runs after, a sum on another stream; a graph's kernels share one launch."""
    device = Device()
    device.run(ALL_GATHER, 90, 30, stream=20, launched=50)
    device.run(ALL_REDUCE, 60, 10, stream=7, launched=51)
    device.run(SEND_RECV, 130, 10, stream=24, launched=52)
    device.graph([("sum_add_norm", 150, 5), ("gemm", 155, 5), ("to_rows", 160, 5), (SEND_RECV, 170, 5)], 53, 7)
    found = recorded(device.events, alone=False).activities
    kinds = ["all_gather", "all_reduce", "recv", "all_reduce", "all_to_all", "all_to_all"]
    pairs = matched(found, kinds, [8] * 6)
    assert not isinstance(pairs, str)
    names = [pair.name for pair in pairs if pair is not None]
    assert names == [ALL_GATHER, ALL_REDUCE, SEND_RECV, "sum_add_norm", "to_rows", SEND_RECV]
    assert "all_reduce" in str(matched(found, kinds[1::-1] + kinds[2:], [8] * 6)), "in another order they do not fit"
    assert matched(found, kinds[:-1], [8] * 5) == "5 collectives were issued, the device ran 6"


def test_a_collective_of_no_bytes_may_have_no_kernel() -> None:
    device = Device()
    device.run(SEND_RECV, 60, 10, stream=7)
    found = recorded(device.events, alone=False).activities
    pairs = matched(found, ["all_to_all", "all_to_all"], [0, 8])
    assert not isinstance(pairs, str)
    assert pairs[0] is None and pairs[1] is not None
    assert isinstance(matched(found, ["all_to_all", "all_to_all"], [8, 8]), str)


def test_short_names() -> None:
    assert short_name("void at::native::vectorized_elementwise_kernel<4, F>(int)") == "vectorized_elementwise_kernel"
    assert short_name(ALL_REDUCE) == "ncclDevKernel_AllReduce_Sum_f16_RING_LL"
