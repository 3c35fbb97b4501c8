"""How GPUs are connected: the class of a set, and which sets are the best."""

import itertools
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.devices import cpu_device, find_devices
from pytest_gpuperf.environment import collect
from pytest_gpuperf.judge import hardware_differences
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import Ancestor
from pytest_gpuperf.records import Hardware
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu
from pytest_gpuperf.topology import best_connected, class_of, links_between

FOUR = tuple(fake_gpu(index) for index in range(4))
A, B, C, D = (gpu.uuid for gpu in FOUR)
DEVICES = find_devices(FakeNvml(*FOUR), cuda_visible_devices=None)
PLACES = get_args(Ancestor)


def links(**script: Any) -> Any:
    return links_between(DEVICES, FakeNvml(*FOUR, **script))


def test_the_worst_connection_names_a_set() -> None:
    found = links(nvlinks=[(A, B)], ancestors={(A, C): "switch", (B, C): "host-bridge"})
    assert class_of(DEVICES[:2], found) == "nvlink"
    assert class_of((DEVICES[0], DEVICES[2]), found) == "switch"
    assert class_of(DEVICES[:3], found) == "host-bridge"


def test_a_set_is_nvlink_only_if_every_pair_is() -> None:
    every = list(itertools.combinations((A, B, C), 2))
    assert class_of(DEVICES[:3], links(nvlinks=every)) == "nvlink"
    assert class_of(DEVICES[:3], links(nvlinks=every[:2], ancestors={every[2]: "switch"})) == "switch"


def test_one_device_has_no_class_nor_has_a_set_of_which_one_pair_is_unknown() -> None:
    found = links(ancestors={(A, B): "switch", (B, C): "switch"})
    assert class_of(DEVICES[:1], found) is None
    assert class_of(DEVICES[:3], found) is None
    assert class_of(DEVICES[:2], links_between(DEVICES, None)) is None
    assert links_between([cpu_device(), cpu_device()], FakeNvml()) == {(cpu_device().uuid, cpu_device().uuid): None}


def test_where_nothing_is_known_every_set_is_as_good() -> None:
    sets = tuple(itertools.combinations(DEVICES, 2))
    assert best_connected(sets, links_between(DEVICES, None)) == sets
    assert best_connected((), {}) == ()


@given(st.lists(st.sampled_from(PLACES), min_size=6, max_size=6), st.integers(2, 4))
def test_the_best_sets_are_those_that_no_other_surpasses(places: list[Ancestor], count: int) -> None:
    found = links(ancestors=dict(zip(itertools.combinations((A, B, C, D), 2), places, strict=True)))
    sets = tuple(itertools.combinations(DEVICES, count))
    ranks = [PLACES.index(place) for one in sets if (place := class_of(one, found)) in PLACES]
    best = tuple(one for one, rank in zip(sets, ranks, strict=True) if rank == min(ranks))
    assert best_connected(sets, found) == best


def test_the_class_is_part_of_what_must_match() -> None:
    machine = Machine("auto", nvml=FakeNvml(*FOUR, nvlinks=[(A, B)]), make_stopwatch=lambda _: FakeStopwatch())
    assert machine.environment(machine.devices[:2]).hardware.link == "nvlink"
    assert machine.environment(machine.devices[:1]).hardware.link is None
    assert collect(DEVICES[:2], driver=None, cuda=None, link="switch").hardware.link == "switch"


@pytest.mark.parametrize(
    ("now", "then", "words"),
    [
        ("nvlink", "host-bridge", ("connected by nvlink, baseline host-bridge",)),
        ("nvlink", "nvlink", ()),
        (None, "nvlink", ()),
        ("nvlink", None, ()),
    ],
)
def test_sets_that_are_connected_otherwise_are_not_compared(
    now: str | None, then: str | None, words: tuple[str, ...]
) -> None:
    assert hardware_differences(Hardware(name="a", link=now), Hardware(name="a", link=then)) == words
