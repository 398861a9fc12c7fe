"""What the hub does about SGLang's cache in host memory, without one."""

from __future__ import annotations

from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.runtime.forward_state import ForwardState
from sgl_flowprefill.runtime.host_cache import HiCache


class Event:
    """Of the device: it has not passed it before somebody waits for it."""

    def __init__(self, passed: bool = True) -> None:
        self.passed = passed

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    wait = synchronize


def cache(counters: list[Event], producer_index: int, **queues: list[Event]) -> Any:
    counter = SimpleNamespace(
        events=[SimpleNamespace(finish_event=event) for event in counters],
        producer_index=producer_index,
        num_counters=len(counters),
    )
    acks = {name: [SimpleNamespace(finish_event=event) for event in events] for name, events in queues.items()}
    controller = SimpleNamespace(layer_done_counter=counter, **({"ack_load_queue": [], "ack_write_queue": []} | acks))
    return SimpleNamespace(
        cache_controller=controller, ongoing_write_through={}, ongoing_load_back={}, check_hicache_events=lambda: None
    )


def test_the_counter_that_the_next_load_takes_is_free() -> None:
    counters = [Event(False), Event(False), Event(False)]
    HiCache(cache(counters, producer_index=2), lambda: None).before_batch()
    assert [counter.passed for counter in counters] == [True, False, False]


def test_a_batch_waits_for_all_loads_but_its_own() -> None:
    loads = [Event(False), Event(False)]
    tree = cache([Event()], 0, ack_load_queue=loads)
    HiCache(tree, lambda: None).after_batch(SimpleNamespace(hicache_consumer_index=0))
    assert [load.passed for load in loads] == [True, False]
    HiCache(tree, lambda: None).after_batch(SimpleNamespace(hicache_consumer_index=-1))
    assert [load.passed for load in loads] == [True, True]


def test_transfers_that_have_ended_are_news_once() -> None:
    tree = cache([Event()], 0)
    host = HiCache(tree, lambda: None)
    tree.ongoing_write_through = {1: None}
    tree.ongoing_load_back = {1: None, 2: None}
    assert not host.take_news()
    tree.ongoing_load_back = {2: None}
    assert host.take_news()
    assert not host.take_news()


def test_the_end_of_each_transfer_wakes_once_however_often_it_is_asked_for() -> None:
    woken: Queue[None] = Queue()
    tree = cache([Event()], 0, ack_write_queue=[Event(False)], ack_load_queue=[Event(False)])
    host = HiCache(tree, lambda: woken.put(None))
    for _ in range(5):
        host.wake_when_done()
    for _ in range(2):
        woken.get(timeout=60)
    with pytest.raises(Empty):
        woken.get(timeout=0.5)


def test_what_each_forward_pass_waits_for_is_restored(monkeypatch: Any) -> None:
    counter = SimpleNamespace(consumer_index=1)
    counter.set_consumer = lambda index: setattr(counter, "consumer_index", index)
    model_runner = SimpleNamespace(attn_backend=None, lora_manager=None)
    bags = {"get_forward": SimpleNamespace(_plain={}), "get_model": SimpleNamespace(shared_experts=None)}
    bags["get_model"]._set = lambda name, value: None
    for name, bag in bags.items():
        monkeypatch.setattr(f"sgl_flowprefill.runtime.forward_state.{name}", lambda bag=bag: bag)
    state = ForwardState.capture(model_runner, counter)
    counter.consumer_index = -1  # a decode step
    state.install(model_runner)
    assert counter.consumer_index == 1
