"""What the outer world has assigned: it narrows what CUDA shows, and never widens it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.assignment import ABSENT, assigned, in_place, may_narrow
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.testing import FakeNvml, fake_gpu

FOUR = tuple(fake_gpu(index) for index in range(4))
UUIDS = [gpu.uuid for gpu in FOUR]


@pytest.mark.parametrize(
    ("environment", "indices"),
    [
        ({}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1"}, None),
        ({"NVIDIA_VISIBLE_DEVICES": f"{UUIDS[2]}, {UUIDS[1]}"}, [2, 1]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-of-another-host"}, None),
        ({"NVIDIA_VISIBLE_DEVICES": ",".join(UUIDS)}, None),
        ({"NVIDIA_VISIBLE_DEVICES": ",".join(reversed(UUIDS))}, None),
        ({"SLURM_JOB_GPUS": "2,3"}, [2, 3]),
        ({"SLURM_JOB_GPUS": "1-3"}, [1, 2, 3]),
        ({"SLURM_JOB_GPUS": "0-3"}, None),
        ({"SLURM_JOB_GPUS": "6,7"}, None),
        ({"SLURM_JOB_GPUS": "gpu:2"}, None),
        ({"SLURM_JOB_GPUS": ""}, None),
        ({"SLURM_JOB_GPUS": "2,3", "SLURM_STEP_GPUS": "3"}, [3]),
        ({"SLURM_JOB_GPUS": "2,3", "NVIDIA_VISIBLE_DEVICES": f"{UUIDS[1]},{UUIDS[2]}"}, [2]),
        ({"SLURM_JOB_GPUS": "3", "NVIDIA_VISIBLE_DEVICES": UUIDS[1]}, [1]),
        ({"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_an_assignment_by_a_container_or_slurm_narrows(environment: dict[str, str], indices: list[int] | None) -> None:
    expected = None if indices is None else tuple(UUIDS[index] for index in indices)
    assert assigned(environment, UUIDS) == expected


def test_a_mig_instance_may_be_assigned() -> None:
    assert assigned({"NVIDIA_VISIBLE_DEVICES": "MIG-a"}, [*UUIDS, "MIG-a", "MIG-b"]) == ("MIG-a",)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"NVIDIA_VISIBLE_DEVICES": UUIDS[1]}, (ABSENT,)),
        ({"NVIDIA_VISIBLE_DEVICES": f"{UUIDS[1]},{UUIDS[2]}"}, (ABSENT, UUIDS[2])),
        ({"NVIDIA_VISIBLE_DEVICES": UUIDS[1], "SLURM_JOB_GPUS": "1"}, (ABSENT,)),
        ({"NVIDIA_VISIBLE_DEVICES": "MIG-of-a-lost-gpu"}, (ABSENT,)),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),
    ],
)
def test_a_container_that_was_given_a_lost_gpu_gets_no_other_for_it(
    environment: dict[str, str], found: tuple[str, ...] | None
) -> None:
    assert assigned(environment, [UUIDS[0], ABSENT, UUIDS[2]]) == found


@pytest.mark.parametrize(
    ("job", "absent", "found"),
    [
        ("1", [], (UUIDS[1],)),
        ("2", [], (UUIDS[2],)),
        ("1-2", [], None),
        ("0", [], None),  # counted in another way: within what it may open
        ("1", [3], (UUIDS[1],)),
        ("3", [3], (ABSENT,)),
    ],
)
def test_slurm_counts_gpus_that_a_job_may_not_open_where_the_driver_does(
    job: str, absent: list[int], found: tuple[str, ...] | None
) -> None:
    places = in_place({1: UUIDS[1], 2: UUIDS[2]}, absent)
    assert assigned({"SLURM_JOB_GPUS": job}, places) == found


@given(
    st.dictionaries(
        st.sampled_from(["NVIDIA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES"]),
        st.text(alphabet="0123,- GPU", max_size=12) | st.sampled_from(UUIDS),
    )
)
def test_nothing_is_ever_widened(environment: dict[str, str]) -> None:
    found = assigned(environment, UUIDS)
    assert found is None or (found and set(found) <= set(UUIDS) and len(set(found)) == len(found))
    assert found is None or may_narrow(environment)


def test_the_environment_names_the_gpus_by_uuid_in_bus_order() -> None:
    environment = {"SLURM_JOB_GPUS": "1,2"}
    Machine("auto", nvml=FakeNvml(*FOUR)).adopt_assignment(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[1]},{UUIDS[2]}"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_an_order_that_the_user_has_chosen_stays() -> None:
    environment = {"SLURM_JOB_GPUS": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    Machine("auto", nvml=FakeNvml(*FOUR)).adopt_assignment(environment)
    assert environment["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_what_the_user_shows_to_cuda_is_not_widened_beside_a_lost_gpu() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": UUIDS[0]}
    Machine("auto", nvml=FakeNvml(*FOUR, lost={UUIDS[1]: 0})).adopt_assignment(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": UUIDS[0]}


def test_beside_gpus_that_it_may_not_open_and_a_lost_one_a_process_is_shown_the_others() -> None:
    environment: dict[str, str] = {}
    Machine("auto", nvml=FakeNvml(*FOUR[1:], lost={UUIDS[2]: 0})).adopt_assignment(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[1]},{UUIDS[3]}"


def test_without_an_assignment_the_environment_stays_as_it_is() -> None:
    environment: dict[str, str] = {}
    Machine("auto", nvml=FakeNvml(*FOUR)).adopt_assignment(environment)
    Machine("cpu").adopt_assignment(environment)
    assert environment == {}
