"""Memory: what is held, counted once a storage; the peak of a stretch; bytes handed to collectives."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_optim.bench.arguments import device
from ds_optim.bench.ranks import default_ranks
from ds_optim.memory import MemoryWatch, TensorTracker, TrafficCounter, account, peak_resident_bytes
from ds_optim.memory.account import innermost_optimizer, parameter_count
from ds_optim.memory.traffic import SentBytes, sent_bytes

WIDTH = 64


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(WIDTH, WIDTH)


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An AdamW that has taken a step, with the gradients of the next one held."""
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        model(torch.ones(2, WIDTH)).sum().backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def zero_like_wrapper(model: torch.nn.Module) -> SimpleNamespace:
    """A ZeRO-1/2 wrapper in shape: weights are views of one flat buffer, the master copy is flat and padded."""
    parameters = list(model.parameters())
    total = parameter_count(model)
    flat = torch.zeros(total + 8, dtype=torch.bfloat16)
    offset = 0
    for parameter in parameters:
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    master = torch.nn.Parameter(flat.float())
    inner = torch.optim.AdamW([master])
    inner.state[master] = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
    }
    return SimpleNamespace(
        optimizer=inner,
        bit16_groups=[parameters],
        bit16_groups_flat=[flat],
        single_partition_of_fp32_groups=[master],
        real_dp_process_group=[None],
        averaged_gradients={0: [torch.zeros(total, dtype=torch.bfloat16)]},
        ipg_buckets={torch.bfloat16: type("IPGBucket", (), {})()},
    )


@pytest.fixture
def single_rank(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_unsharded_account_matches_the_formula(model: torch.nn.Module) -> None:
    optimizer = trained(model)
    held = account(SimpleNamespace(module=model), optimizer)
    parameters = WIDTH * WIDTH + WIDTH
    assert held.weights == held.gradients == 4 * parameters
    assert held.state == {"exp_avg": 4 * parameters, "exp_avg_sq": 4 * parameters}
    assert held.master == 0, "the weights are their own master copy"
    assert held.state_bytes == 8 * parameters
    assert held.model_state_bytes == 16 * parameters
    assert held.scalars == 2 * 4, "one step count a parameter, kept apart from the state"


def test_views_and_ties_count_once(model: torch.nn.Module) -> None:
    tied = torch.nn.Linear(WIDTH, WIDTH)
    tied.weight = model.weight
    both = torch.nn.ModuleList([model, tied])
    held = account(SimpleNamespace(module=both), torch.optim.SGD(both.parameters()))
    assert held.weights == 4 * (WIDTH * WIDTH + 2 * WIDTH)


def test_flat_partitions_and_their_padding(model: torch.nn.Module, single_rank: None) -> None:
    wrapper = zero_like_wrapper(model)
    total = parameter_count(model)
    held = account(SimpleNamespace(module=model, optimizer=wrapper))
    assert held.weights == 2 * (total + 8), "the flat buffer once, not once a view"
    assert held.master == 4 * (total + 8)
    assert held.master_padding == 4 * 8
    assert held.state_padding == 2 * 4 * 8
    assert held.state_bytes == 8 * total, "padding is no parameter's state"
    assert held.gradients == 2 * total
    assert held.other == held.buckets == 0


def test_master_weights_that_are_the_weights_count_once(model: torch.nn.Module, single_rank: None) -> None:
    wrapper = zero_like_wrapper(model)
    total = parameter_count(model)
    wrapper.single_partition_of_fp32_groups = wrapper.bit16_groups_flat
    wrapper.optimizer = torch.optim.SGD(wrapper.bit16_groups_flat)
    held = account(SimpleNamespace(module=model, optimizer=wrapper))
    assert held.weights == 2 * (total + 8)
    assert held.master == held.master_padding == 0
    assert held.model_state_bytes == 2 * (total + 8) + 2 * total


def test_what_no_owner_claims_is_not_lost(model: torch.nn.Module, single_rank: None) -> None:
    wrapper = zero_like_wrapper(model)
    wrapper.ipg_buckets[torch.bfloat16].buffer = [torch.zeros(100)]
    wrapper.muon_momentum_buffer_partitioned_groups_flat = {0: torch.zeros(50)}
    wrapper._muon_pending_momentum = {0: torch.zeros(10)}
    wrapper.something_new = [(torch.zeros(25),)]
    held = account(SimpleNamespace(module=model, optimizer=wrapper))
    assert held.buckets == 400 + 40, "a staging copy is no state"
    assert held.state["muon_momentum_buffer_partitioned_groups_flat"] == 200
    assert held.other == 100


def test_innermost_optimizer_is_found_under_wrappers(model: torch.nn.Module) -> None:
    inner = torch.optim.SGD(model.parameters())
    assert innermost_optimizer(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))) is inner
    assert innermost_optimizer(None) is None


def test_tracker_follows_births_and_deaths() -> None:
    before = torch.zeros(500)
    with TensorTracker() as tracker:
        assert tracker.base_bytes >= before.nbytes
        first = torch.zeros(1000)
        view = first.view(10, 100)
        assert tracker.live_bytes - tracker.base_bytes == 4000, "a view has no bytes of its own"
        second = first + 1
        del first
        assert tracker.live_bytes - tracker.base_bytes == 8000, "the view keeps its storage alive"
        del view, second
        assert tracker.live_bytes == tracker.base_bytes
    assert tracker.peak_bytes - tracker.base_bytes == 8000


def test_tracker_sees_activations_that_autograd_alone_holds(model: torch.nn.Module) -> None:
    rows = torch.ones(256, WIDTH)
    with TensorTracker() as tracker:
        loss = model(rows).sigmoid().sum()
        held = tracker.live_bytes - tracker.base_bytes
        assert held == 256 * WIDTH * 4 + 4, "the output of sigmoid, and the loss"
        loss.backward()
        del loss
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert tracker.live_bytes - tracker.base_bytes == gradients


def test_traffic_of_one_rank_is_nothing(single_rank: None) -> None:
    with TrafficCounter() as counter:
        dist.all_reduce(torch.ones(8))
        dist.all_to_all_single(torch.ones(8), torch.ones(8), [8], [8])
    assert counter.sent_bytes == 0
    assert set(counter.by_operator) == {"allreduce_", "alltoall_base_"}
    assert not counter.unknown


def _exchange(rank: int, store: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with TrafficCounter() as counter:
        dist.all_reduce(torch.ones(100))  # 2 * 400 * 1/2
        dist.all_gather([torch.ones(50), torch.ones(50)], torch.ones(50))  # 400 * 1/2
        dist.broadcast(torch.ones(100), 0)  # 400 * 1/2, mean of 400 and 0
        # Rank 0 keeps 10 elements and sends 30; rank 1 sends 20 and keeps 0.
        given, taken = ([10, 30], [10, 20]) if rank == 0 else ([20, 0], [30, 0])
        dist.all_to_all_single(torch.ones(sum(taken)), torch.ones(sum(given)), taken, given)
    results.put((rank, counter.by_operator))
    dist.destroy_process_group()


def test_traffic_between_two_ranks(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_exchange, args=(r, str(tmp_path / "store"), results)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counted = dict(results.get() for _ in processes)
    for rank, to_all in ((0, 120), (1, 80)):
        assert counted[rank] == {"allreduce_": 400, "allgather_": 200, "broadcast_": 200, "alltoall_base_": to_all}


def test_peak_resident_memory(tmp_path: Any) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\n")
    assert peak_resident_bytes(status) == 2048 * 1024
    assert peak_resident_bytes(tmp_path / "missing") is None


def test_bytes_of_interfaces_are_told_apart(tmp_path: Any) -> None:
    table = tmp_path / "dev"
    head = "Inter-|   Receive |  Transmit\n face |bytes    packets errs drop fifo frame compressed|bytes packets\n"
    counters = "    {name}: {received} 0 0 0 0 0 0 0 {sent} 1 0 0 0 0 0 0\n"
    lines = [counters.format(name=n, received=7, sent=s) for n, s in (("lo", 100), ("eth0", 20), ("ib0", 3))]
    table.write_text(head + "".join(lines))
    before = sent_bytes(table)
    assert before == SentBytes(inside=100, between=23)
    later = SentBytes(inside=150, between=30)
    assert later.since(before) == SentBytes(inside=50, between=7)
    assert sent_bytes(tmp_path / "none") is None


class Allocator:
    """An accelerator of DeepSpeed's, whose allocator says these numbers."""

    def __init__(self, name: str) -> None:
        self.name, self.resets = name, 0

    def device_name(self) -> str:
        return self.name

    def reset_peak_memory_stats(self) -> None:
        self.resets += 1

    def memory_stats(self) -> dict[str, int]:
        return {"active_bytes.all.peak": 6}

    def __getattr__(self, name: str) -> Any:
        numbers = {"memory_allocated": 4, "max_memory_allocated": 5, "max_memory_reserved": 7, "memory_reserved": 7}
        numbers |= {"total_memory": 100, "available_memory": 60}
        return lambda: numbers[name]


def test_memory_is_that_of_the_accelerator_that_deepspeed_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of whatever GPU there is: with DS_ACCELERATOR=cpu nothing is allocated on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gc.collect()  # what other tests left and nothing holds; what something holds is counted too
    with MemoryWatch() as watch:
        before = watch.held()
        held = torch.zeros(1000)
        assert watch.kind == "live tensors"
        assert watch.held() == watch.peak().allocated
        assert watch.held() - before == pytest.approx(held.nbytes, abs=100), "but for what hooks make"
    xpu = Allocator("xpu")
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: xpu)
    with MemoryWatch() as watch:
        peak = watch.peak()
        assert (watch.kind, watch.held(), xpu.resets) == ("the XPU allocator", 4, 1)
        assert (peak.allocated, peak.active, peak.reserved, peak.outside) == (5, 6, 7, 100 - 60 - 7)


@pytest.mark.parametrize(("chosen", "gpus"), [("cpu", 0), ("cuda", 3), (None, 3)])
def test_gpus_that_nobody_computes_on_do_not_count(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, gpus: int
) -> None:
    get_accelerator()  # it stays what it was at the first call
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if chosen is None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    else:
        monkeypatch.setenv("DS_ACCELERATOR", chosen)
    assert default_ranks() == (gpus or 4)
    assert device("auto")[0].type == ("cuda" if gpus else "cpu")
