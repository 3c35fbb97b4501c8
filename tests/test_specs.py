"""The packaged spec table against itself: tables of peaks are often wrong, and this one is recomputed."""

from pytest_gpuperf.specs import GpuSpec, load_specs

SPECS = load_specs().gpus

#: GeForce parts and two others multiply with fp32 accumulate at half the rate of their architecture.
HALF_RATE = {
    "RTX-3090": "geforce_and_a10g",
    "A10G": "geforce_and_a10g",
    "RTX-4090": "geforce_and_l40",
    "L40": "geforce_and_l40",
    "RTX-5090": "geforce",
}
#: Of those, int8 is halved too on these two (the notes of the table).
HALF_RATE_INT8 = {"A10G": 1024, "L40": 1024}

#: NVIDIA publishes 7.7 TB/s for B200 boards whose memory clock (3996 MHz, 8192 bit) makes 8.18 TB/s.
BANDWIDTH_BELOW_ITS_CLOCK = {"B200": -0.059}


def rates(spec: GpuSpec) -> dict[str, int]:
    row = load_specs().flop_per_clock_per_sm[spec.compute_capability]
    assert isinstance(row, dict)
    plain = {column: rate for column, rate in row.items() if isinstance(rate, int)}
    half = row.get(HALF_RATE.get(spec.key, ""), {})
    assert isinstance(half, dict)
    plain.update({column: rate for column, rate in half.items() if isinstance(rate, int)})
    return {**plain, "int8": HALF_RATE_INT8[spec.key]} if spec.key in HALF_RATE_INT8 else plain


def test_every_published_tensor_peak_is_sms_times_clock_times_rate_within_two_percent() -> None:
    checked = 0
    for spec in SPECS:
        if spec.tensor_peak_clock_mhz is None or spec.sm_count is None:
            continue
        for column, rate in rates(spec).items():
            published = spec.peak_tflops_dense.get(column)
            if published is not None:
                computed = spec.sm_count * spec.tensor_peak_clock_mhz * rate / 1e6
                assert abs(published / computed - 1) <= 0.02, f"{spec.key} {column}: {published} vs {computed:.1f}"
                checked += 1
    assert checked > 130


def test_every_nvidia_gpu_has_the_cores_of_its_sms() -> None:
    for spec in SPECS:
        if spec.cuda_cores is not None and spec.sm_count is not None and spec.vendor == "NVIDIA":
            per_sm = {"7.0": 64, "7.5": 64, "8.0": 64}.get(spec.compute_capability, 128)
            assert spec.cuda_cores == spec.sm_count * per_sm, spec.key


def test_every_nvidia_gpu_has_the_tensor_cores_of_its_sms() -> None:
    for spec in SPECS:
        if spec.tensor_cores is not None and spec.sm_count is not None and spec.vendor == "NVIDIA":
            per_sm = {"7.0": 8, "7.5": 8}.get(spec.compute_capability, 4)
            assert spec.tensor_cores == spec.sm_count * per_sm, spec.key


def test_every_bandwidth_is_memory_clock_times_bus_within_two_and_a_half_percent() -> None:
    beyond = {}
    for spec in SPECS:
        if spec.memory_clock_mhz and spec.memory_bus_bits and spec.memory_bandwidth_gbs:
            computed = spec.memory_clock_mhz * 2 * spec.memory_bus_bits / 8 / 1e3
            difference = spec.memory_bandwidth_gbs / computed - 1
            if abs(difference) > 0.025:
                beyond[spec.key] = round(difference, 3)
    assert beyond == BANDWIDTH_BELOW_ITS_CLOCK


def test_keys_names_and_pci_ids_belong_to_one_row() -> None:
    for values in (
        [spec.key for spec in SPECS],
        [name for spec in SPECS for name in spec.names],
        [device_id for spec in SPECS for device_id in spec.pci_device_ids],
    ):
        assert len(values) == len(set(values))


def test_pci_ids_are_four_upper_case_hex_digits() -> None:
    for spec in SPECS:
        for device_id in spec.pci_device_ids:
            assert len(device_id) == 4, spec.key
            assert int(device_id, 16) > 0, spec.key
            assert device_id == device_id.upper(), spec.key


def test_every_row_names_sources_that_the_table_lists() -> None:
    for spec in SPECS:
        assert spec.sources, spec.key
        assert set(spec.sources) <= load_specs().sources.keys(), spec.key


def test_the_table_has_all_its_rows() -> None:
    assert len(SPECS) == 38
