"""What NVML measures between two calls: the hardware's counters (GPM), and critical errors (events).

Both work on nvidia-ml-py's module and a handle, which `nvml` hands over: nothing else imports it.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from pytest_gpuperf.records import Record

#: Closer samples give nothing (DCGM keeps its own interval of 100 ms, too).
LEAST_INTERVAL_S = 0.1

#: Field -> GPM metric (nvml.h, nvmlGpmMetricId_t), and what its value is multiplied by: percent, or MiB/s.
_PERCENT, _MIB = 0.01, float(2**20)
_METRICS = {
    "sm_share": (2, _PERCENT),
    "occupancy": (3, _PERCENT),
    "tensor_share": (5, _PERCENT),
    "dram_share": (10, _PERCENT),
    "pcie_tx_bytes_per_s": (20, _MIB),
    "pcie_rx_bytes_per_s": (21, _MIB),
    "nvlink_rx_bytes_per_s": (60, _MIB),
    "nvlink_tx_bytes_per_s": (61, _MIB),
}


class GpuActivity(Record, frozen=True, kw_only=True):
    """Means of the hardware's counters over a stretch of time; shares are of what the hardware could do, 0 to 1.

    Attributes:
        duration_s: Of the stretch.
        sm_share: Time in which a multiprocessor had a warp, over all of them.
        occupancy: Warps over the most that the multiprocessors hold.
        tensor_share: Time in which the tensor cores worked.
        dram_share: Time in which the memory's interface moved data.
        pcie_tx_bytes_per_s: From the GPU to the host; `rx` is the other way.
        nvlink_rx_bytes_per_s: Over all links of the GPU, as `tx`.
    """

    duration_s: float
    sm_share: float | None = None
    occupancy: float | None = None
    tensor_share: float | None = None
    dram_share: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None
    nvlink_rx_bytes_per_s: float | None = None
    nvlink_tx_bytes_per_s: float | None = None


def activity_meter(
    pynvml: Any, handle: Any, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[], GpuActivity | None]:
    """See `nvml.Nvml.activity_meter`. A GPU that cannot, or a failure, gives `None`: nobody depends on this."""
    try:
        if not pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            return lambda: None
        meter = _ActivityMeter(pynvml, handle, clock)
    except (pynvml.NVMLError, AttributeError):  # the latter: an nvidia-ml-py without GPM
        return lambda: None
    return meter.read


class _ActivityMeter:
    """Two samples that take turns; a sample is a piece of the driver's memory."""

    def __init__(self, pynvml: Any, handle: Any, clock: Callable[[], float]) -> None:
        self._pynvml, self._handle, self._clock = pynvml, handle, clock
        self._before, self._now = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
        self._asked = self._question()
        self._at_s = self._take(self._before)

    def read(self) -> GpuActivity | None:
        if self._clock() - self._at_s < LEAST_INTERVAL_S:
            return None
        try:
            at_s = self._take(self._now)
            self._asked.sample1, self._asked.sample2 = self._before, self._now
            self._pynvml.nvmlGpmMetricsGet(self._asked)
        except self._pynvml.NVMLError:
            return None
        duration_s, self._at_s = at_s - self._at_s, at_s
        self._before, self._now = self._now, self._before
        return GpuActivity(duration_s=duration_s, **self._values())

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may have been closed before us
            self._pynvml.nvmlGpmSampleFree(self._before)
            self._pynvml.nvmlGpmSampleFree(self._now)

    def _question(self) -> Any:
        asked = self._pynvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = self._pynvml.NVML_GPM_METRICS_GET_VERSION, len(_METRICS)
        for place, (metric, _) in enumerate(_METRICS.values()):
            asked.metrics[place].metricId = metric
        return asked

    def _take(self, sample: Any) -> float:
        self._pynvml.nvmlGpmSampleGet(self._handle, sample)
        return self._clock()

    def _values(self) -> dict[str, float | None]:
        found = (self._asked.metrics[place] for place in range(len(_METRICS)))
        return {
            field: one.value * factor if one.nvmlReturn == 0 and math.isfinite(one.value) else None
            for (field, (_, factor)), one in zip(_METRICS.items(), found, strict=True)
        }


def error_meter(pynvml: Any, handle: Any) -> Callable[[], tuple[int, ...]] | None:
    """See `nvml.Nvml.error_meter`."""
    try:
        wanted = pynvml.nvmlEventTypeXidCriticalError
        if not pynvml.nvmlDeviceGetSupportedEventTypes(handle) & wanted:
            return None
        events = pynvml.nvmlEventSetCreate()
        pynvml.nvmlDeviceRegisterEvents(handle, wanted, events)
    except (pynvml.NVMLError, AttributeError):
        return None

    def read() -> tuple[int, ...]:
        codes = []
        with contextlib.suppress(pynvml.NVMLError):  # a timeout is how it says that there is no more
            while True:
                codes.append(int(pynvml.nvmlEventSetWait_v2(events, 0).eventData))
        return tuple(codes)

    return read
