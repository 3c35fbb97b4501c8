"""`gpuperf monitor` as its user sees it: the view, lines, JSON, files, a command's summary; and how it ends."""

import contextlib
import csv
import errno
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from harness import CommandResult, gpuperf
from msgspec.structs import replace
from rich.console import Console

from pytest_gpuperf.commands import host
from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuUsage, Nvml
from pytest_gpuperf.report import watch_files
from pytest_gpuperf.report.watch import View, sample_line, sparkline, summary_lines, view_text
from pytest_gpuperf.report.watch_files import FIELDS, open_file, row_of
from pytest_gpuperf.report.watch_run import Plan, monitor
from pytest_gpuperf.testing import FakeNvml, fake_gpu
from pytest_gpuperf.trials.watch import Sample, Summary

SAMPLE = Sample(
    date="2026-11-21T10:12:51.123+00:00",
    time_s=72.0,
    gpu=0,
    uuid="GPU-0",
    name="NVIDIA H200",
    status="power-capped",
    reason="1410 MHz at the limit of 700 W",
    memory_used_bytes=61_200_000_000,
    memory_bytes=143_771_000_000,
    busy_share=0.98,
    power_w=698.0,
    power_limit_w=700.0,
    temperature_c=64.0,
    sm_clock_mhz=1410.0,
    activity_s=0.2,
    sm_share=0.92,
    tensor_share=0.71,
    dram_share=0.34,
    nvlink_rx_bytes_per_s=123e9,
    nvlink_tx_bytes_per_s=1.19e9,
    pcie_rx_bytes_per_s=9.96e9,
    pcie_tx_bytes_per_s=0.0,
)
LOST = Sample(
    date="2026-11-21T10:12:51.123+00:00",
    time_s=72.0,
    gpu=1,
    uuid="GPU-1",
    name="NVIDIA H200",
    status="lost",
    reason="GPU 1 (NVIDIA H200, GPU-1) is lost: it has fallen off the bus. What was measured on it is not valid.",
    error="GPU 1 (NVIDIA H200, GPU-1) is lost: it has fallen off the bus. What was measured on it is not valid.",
)
SUMMARY = Summary(
    gpu=0,
    uuid="GPU-0",
    name="NVIDIA H200",
    duration_s=63.24,
    samples=632,
    energy_j=32_100.0,
    mean_power_w=508.0,
    peak_power_w=702.0,
    power_limit_w=700.0,
    busy_share=0.61,
    sm_share=0.55,
    tensor_share=0.31,
    dram_share=0.22,
    peak_memory_used_bytes=61_200_000_000,
    memory_bytes=143_771_000_000,
    peak_temperature_c=64.0,
    mean_sm_clock_mhz=1512.0,
    lowest_sm_clock_mhz=1290.0,
    power_cap_share=0.41,
    sync_boost_share=0.0,
    sw_thermal_share=0.0,
    hw_thermal_share=0.0,
    power_brake_share=0.0,
)

#: A program of its own that is `gpuperf`, on fake GPUs.
FAKE = """
import sys
from pytest_gpuperf import cli
from pytest_gpuperf.commands import host
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.testing import FakeNvml, fake_gpu

nvml = FakeNvml(fake_gpu(0), fake_gpu(1), usages=[GpuUsage(busy_share=0.5, power_w=300.0, holds=())])
host.Machine = lambda choice: Machine(choice, nvml=nvml)
cli.main()
"""


def gpus_of(count: int) -> list[Sample]:
    return [replace(SAMPLE, gpu=number, uuid=f"GPU-{number}") for number in range(count)]


def drawn(samples: Sequence[Sample], *, width: int = 80, height: int = 24, is_ascii: bool = False) -> list[str]:
    history = {sample.uuid: [sample] * 40 for sample in samples}
    text = view_text(samples, history, interval_s=1.0, width=width, height=height, is_ascii=is_ascii)
    return text.plain.splitlines()


def test_view_of_a_gpu_has_a_heading_titles_and_two_lines() -> None:
    assert drawn([SAMPLE]) == [
        "1 x NVIDIA H200  every 1 s  0:01:12  Ctrl-C ends",
        "GPU busy   SM tensor DRAM   memory GB   power W   C  MHz  NVLink    PCIe GB/s",
        "  0  98%  92%    71%  34%  61.2/143.8   698/700  64 1410 123/1.2  10/0.0",
        " busy ████████████ W ████████████  power-capped: 1410 MHz at the limit of 700 W",
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_view_fits_the_terminal(count: int, width: int) -> None:
    lines = drawn(gpus_of(count), width=width)
    assert len(lines) == 2 + 2 * count <= 23
    assert max(map(len, lines)) <= width


def test_view_of_a_low_terminal_has_one_line_a_gpu_with_the_status_in_place_of_the_links() -> None:
    lines = drawn(gpus_of(8), height=14)
    assert len(lines) == 10
    assert lines[1].endswith("status")
    assert lines[2] == "  0  98%  92%    71%  34%  61.2/143.8   698/700  64 1410  power-capped: 1410 MH…"
    assert max(map(len, lines)) <= 80


def test_a_gpu_that_is_lost_is_shown_with_the_reason_cut_to_the_line() -> None:
    lines = drawn([SAMPLE, LOST])
    assert lines[4].split() == ["1", *["-"] * 10]
    assert lines[5].endswith("lost: GPU 1 (NVIDIA H200, GPU-1) is lost: it…")
    assert len(lines[5]) <= 80


def test_gpus_of_several_kinds_are_counted_in_the_heading() -> None:
    lines = drawn([SAMPLE, replace(SAMPLE, name="NVIDIA L4"), SAMPLE])
    assert lines[0].startswith("2 x NVIDIA H200, 1 x NVIDIA L4  every")


def test_a_terminal_without_blocks_gets_plain_characters() -> None:
    text = "\n".join(drawn([SAMPLE, LOST], is_ascii=True))
    assert text.isascii()
    assert "####" in text


def test_status_is_told_by_words_and_colour_only_adds() -> None:
    history = {LOST.uuid: [LOST]}
    text = view_text([LOST], history, interval_s=1.0)
    assert any("red" in str(span.style) for span in text.spans)
    assert "lost:" in text.plain


def test_sparkline_grows_with_the_value_and_leaves_gaps() -> None:
    line = sparkline([number / 20 for number in range(21)], most=1.0, width=21)
    assert line == "".join(sorted(line))
    assert (line[0], line[-1]) == ("▁", "█")
    assert set(line) == set("▁▂▃▄▅▆▇█")
    assert sparkline([None, 1.0, None], most=1.0, width=5) == "   █ "
    assert sparkline([9.0], most=1.0, width=1) == "█"
    assert sparkline([1.0, 2.0], most=0.0, width=2) == "  "
    assert sparkline([], most=1.0, width=3) == "   "


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_view_is_drawn_four_times_a_second_at_most() -> None:
    clock, output = Time(), io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, height=24)
    drawings = 0
    with View(console, interval_s=0.01, clock=clock) as view:
        for number in range(200):  # two seconds
            clock.now_s = number / 100
            size = len(output.getvalue())
            view.show([SAMPLE])
            drawings += len(output.getvalue()) > size
    assert 7 <= drawings <= 8


def test_view_shows_the_last_mean_of_the_counters_until_the_next() -> None:
    clock, output = Time(), io.StringIO()
    without = replace(SAMPLE, activity_s=None, sm_share=None, tensor_share=None, dram_share=None)
    with View(Console(file=output, force_terminal=True, width=80), interval_s=1.0, clock=clock) as view:
        view.show([SAMPLE])
        clock.now_s, before = 1.0, len(output.getvalue())
        view.show([without])
        assert "92%" in output.getvalue()[before:]
        clock.now_s, before = 2.0, len(output.getvalue())
        view.show([replace(LOST, uuid=SAMPLE.uuid)])
        assert "92%" not in output.getvalue()[before:]


def test_a_line_leaves_out_what_is_not_known() -> None:
    assert sample_line(SAMPLE) == (
        "2026-11-21T10:12:51.123+00:00 GPU 0: busy 98%, SM 92%, tensor 71%, DRAM 34%, memory 61.2/143.8 GB, "
        "power 698/700 W, at 64 C, clock 1410 MHz, NVLink 123/1.2 GB/s, PCIe 10/0.0 GB/s, "
        "power-capped (1410 MHz at the limit of 700 W)"
    )
    assert sample_line(LOST) == f"2026-11-21T10:12:51.123+00:00 GPU 1: lost ({LOST.error})"


def test_summary_says_all_in_six_lines_of_80_columns() -> None:
    lines = summary_lines(SUMMARY)
    assert lines == [
        "GPU 0 NVIDIA H200: 63.2 s, 632 samples",
        "  busy 61 %, idle 39 %; SM 55 %, tensor 31 %, DRAM 22 %",
        "  energy 32.10 kJ, power 508 W mean, 702 W peak, 700 W limit",
        "  memory 61.20 GB peak of 143.8 GB, 64 C at most",
        "  SM clock at work 1512 MHz mean, 1290 MHz lowest",
        "  clock held down: power cap 41 %",
    ]
    assert max(map(len, lines)) <= 80


def test_summary_names_strangers_and_errors() -> None:
    lines = summary_lines(replace(SUMMARY, other_process_pids=(7, 8), errors=("Xid 13", "lost")))
    assert lines[-3:] == ["  other processes: pid 7, 8", "  error: Xid 13", "  error: lost"]


def test_summary_of_little_says_what_is_not_known() -> None:
    short = replace(SUMMARY, duration_s=2.0, energy_j=None, power_cap_share=0.0, busy_share=None, sm_share=None)
    lines = summary_lines(replace(short, tensor_share=None, dram_share=None))
    assert lines[1] == "  busy -, idle -"
    assert lines[2].startswith("  energy not known (under 5 s), ")
    assert lines[5] == "  clock held down: never"
    nothing = replace(SUMMARY, energy_j=None, **dict.fromkeys(name for name in _held_names()))
    assert summary_lines(nothing)[2].startswith("  energy not known, ")
    assert summary_lines(nothing)[5] == "  clock held down: not known"


def _held_names() -> Iterator[str]:
    return (f"{name}_share" for name in ("power_cap", "sync_boost", "sw_thermal", "hw_thermal", "power_brake"))


def test_csv_has_a_heading_a_row_a_sample_and_nothing_where_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    file = open_file(path)
    file.add([replace(SAMPLE, reason='a, "b"', holds=("power cap", "sync boost"), xids=(13, 31)), LOST])
    with path.open(newline="") as reading:  # before it is closed: a kill leaves what is there
        first, second = csv.DictReader(reading)
    file.close()

    assert tuple(first) == FIELDS
    assert (first["reason"], first["holds"], first["xids"]) == ('a, "b"', "power cap; sync boost", "13; 31")
    assert (first["power_w"], second["power_w"], second["error"]) == ("698.0", "", LOST.error)


def test_lines_of_json_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = open_file(path)
    file.add([SAMPLE, LOST])
    first, second = map(json.loads, path.read_text().splitlines())
    file.close()
    assert (first["busy_share"], second["busy_share"], second["status"]) == (0.98, None, "lost")
    assert tuple(first) == ("record", *FIELDS)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as error:
        open_file(tmp_path / "out.parquet")
    assert str(error.value) == (
        "Parquet needs pyarrow: pip install 'pytest-gpuperf[monitor]'. Or write --output with .csv or .jsonl."
    )
    assert list(tmp_path.iterdir()) == []


def test_parquet_is_read_again_with_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(watch_files, "_ROWS", 2)
    file = open_file(tmp_path / "out.parquet")
    for _ in range(3):
        file.add([SAMPLE, LOST])
    file.close()
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.to_pylist()[:2] == [row_of(SAMPLE), row_of(LOST)]
    assert (table.num_rows, parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups) == (6, 3)


class FakeArrow:
    """What of pyarrow is used, noting what is written: the real one is an extra."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[dict[str, object]]] = []
        self.is_closed = False
        arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
        table = ModuleType("Table")
        table.from_pylist = lambda rows, schema: [{name: row[name] for name, _ in schema} for row in rows]  # type: ignore[attr-defined]
        arrow.__dict__.update(string=str, int64=int, float64=float, schema=list, Table=table, parquet=parquet)
        parquet.__dict__["ParquetWriter"] = lambda *_: self
        monkeypatch.setitem(sys.modules, "pyarrow", arrow)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)

    def write_table(self, rows: list[dict[str, object]]) -> None:
        self.groups.append(rows)

    def close(self) -> None:
        self.is_closed = True


def test_parquet_goes_out_in_groups_and_the_rest_on_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = FakeArrow(monkeypatch)
    monkeypatch.setattr(watch_files, "_ROWS", 4)
    file = open_file(tmp_path / "out.parquet")
    for _ in range(3):
        file.add([SAMPLE, LOST])
    assert [len(group) for group in arrow.groups] == [4]
    file.close()
    assert [len(group) for group in arrow.groups] == [4, 2]
    assert arrow.is_closed
    assert arrow.groups[0][0] == row_of(SAMPLE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", "ends in none of .csv, .jsonl, .parquet: the end says which kind to write."),
        ("out", "ends in none of .csv, .jsonl, .parquet"),
        ("no/out.csv", "cannot be written: No such file or directory."),
        ("old.csv", "is there already. Name another file, or remove it."),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "old.csv").write_text("precious")
    with pytest.raises(UsageError) as error:
        open_file(tmp_path / name)
    assert message in str(error.value)
    assert (tmp_path / "old.csv").read_text() == "precious"


USAGES = [GpuUsage(busy_share=0.5, power_w=300.0, holds=())]


def monitored(monkeypatch: pytest.MonkeyPatch, *arguments: str, nvml: Nvml | None = None) -> CommandResult:
    """Run the command on fake GPUs, in this process."""
    driver = nvml or FakeNvml(fake_gpu(0), fake_gpu(1), usages=USAGES)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(host, "Machine", lambda choice: Machine(choice, nvml=driver))
    return gpuperf("monitor", *arguments)


def test_without_a_terminal_there_is_a_line_a_gpu_a_sample_and_then_the_summary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = monitored(monkeypatch, "--interval", "0.02", "--duration", "0.05")
    lines = done.output.splitlines()
    assert done.code == 0
    assert sum(" GPU 0: busy 50%, memory" in line or " GPU 0: busy 50%, power" in line for line in lines) >= 3
    assert [line for line in lines if line.startswith("GPU ")] == [
        line for line in lines if line.startswith(("GPU 0 NVIDIA H100", "GPU 1 NVIDIA H100"))
    ]
    assert len([line for line in lines if line.startswith("GPU ")]) == 2


def test_json_is_one_object_a_line_with_null_for_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    done = monitored(monkeypatch, "--json", "--interval", "0.02", "--duration", "0.03")
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert [row["record"] for row in rows][-2:] == ["summary", "summary"]
    first = rows[0]
    assert tuple(first) == ("record", *FIELDS)
    assert (first["gpu"], first["busy_share"], first["sm_share"], first["temperature_c"]) == (0, 0.5, None, None)


def test_gpus_can_be_chosen_and_those_that_are_not_visible_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    done = monitored(monkeypatch, "--json", "--gpus", "1", "--duration", "0.01")
    assert {json.loads(line)["gpu"] for line in done.output.splitlines()} == {1}

    monkeypatch.setattr(host, "Machine", lambda choice: Machine(choice, nvml=FakeNvml(fake_gpu(0), fake_gpu(1))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    shown = {
        json.loads(line)["uuid"] for line in gpuperf("monitor", "--json", "--duration", "0.01").output.splitlines()
    }
    assert shown == {fake_gpu(1).uuid}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--interval", "0"), "--interval 0 is not a number of seconds of 0.01 and more."),
        (("--interval", "nan"), "--interval nan is not a number of seconds"),
        (("--duration", "-1"), "--duration -1 is not a number of seconds above 0."),
        (("--duration", "1", "--", "true"), "A command is watched until it ends. Drop --duration"),
        (("--live", "--json"), "--live and --json both want the output."),
        (("--live",), "--live needs a terminal. Without one there are lines, --json and --output."),
        (("--gpus", "7"), "--gpus: '7' is no GPU here."),
        (("--output", "x.txt"), "--output x.txt ends in none of"),
    ],
)
def test_mistakes_are_one_message(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    done = monitored(monkeypatch, *arguments)
    assert (done.code, done.output) == (1, "")
    assert message in done.errors
    assert done.errors.count("\n") == 1


def test_without_a_driver_or_a_gpu_the_message_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> Nvml:
        raise DeviceError("No NVIDIA driver was found (libnvidia-ml.so.1 is missing).")

    monkeypatch.setattr("pytest_gpuperf.machine.open_nvml", no_driver)
    done = gpuperf("monitor")
    assert (done.code, done.output) == (1, "")
    assert done.errors == "gpuperf: No NVIDIA driver was found (libnvidia-ml.so.1 is missing).\n"

    monkeypatch.setattr(host, "Machine", lambda choice: Machine(choice, nvml=FakeNvml()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "The driver shows no GPU (CUDA_VISIBLE_DEVICES=)" in gpuperf("monitor").errors


def test_a_command_is_watched_to_its_end_and_its_summary_stands_beside_its_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = monitored(monkeypatch, "--", "sh", "-c", "echo from the command; exit 7")
    assert (done.code, done.output) == (7, "")
    assert capfd.readouterr().out == "from the command\n"
    assert done.errors.splitlines()[0].startswith("GPU 0 NVIDIA H100 80GB HBM3: ")
    assert "  busy 50 %, idle 50 %" in done.errors.splitlines()


def test_a_command_with_json_gives_a_summary_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    done = monitored(monkeypatch, "--json", "--output", str(path), "--interval", "0.01", "--", "sleep", "0.1")
    assert [json.loads(line)["record"] for line in done.errors.splitlines()] == ["summary", "summary"]
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) > 10


def test_a_command_ends_the_watch_at_once_whatever_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_s = time.monotonic()
    assert monitored(monkeypatch, "--interval", "30", "--", "true").code == 0
    assert time.monotonic() - begin_s < 5


def test_a_command_that_does_not_exist_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    done = monitored(monkeypatch, "--output", str(path), "--", "no-such-command")
    assert (done.code, done.output) == (127, "")
    assert done.errors == ("gpuperf: no-such-command: there is no such command. Is it installed, and on the PATH?\n")
    assert not path.exists()


@pytest.mark.parametrize("arguments", [("--live",), ("--live", "--", "true")])
def test_a_live_view_without_a_terminal_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    path = tmp_path / "samples.csv"
    done = monitored(monkeypatch, "--output", str(path), *arguments)
    assert done.code == 1
    assert done.errors.startswith("gpuperf: --live needs a terminal.")
    assert not path.exists()


def test_a_gpu_that_is_lost_in_the_middle_is_in_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: dict[int | tuple[str, int], Exception] = {
        ("usage", 3): DeviceError("GPU 0 is lost: it has fallen off the bus.")
    }
    nvml = FakeNvml(fake_gpu(0), fake_gpu(1), usages=USAGES, errors=gone)
    done = monitored(monkeypatch, "--interval", "0.02", "--duration", "0.1", nvml=nvml)
    assert done.code == 0
    assert done.output.count("GPU 0: lost (GPU 0 is lost") >= 2
    assert done.output.count("  error: GPU 0 is lost: it has fallen off the bus.") == 1


def test_a_disk_that_fills_up_is_said_once_and_the_watch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full:
        def add(self, samples: Sequence[Sample]) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            pass

    monkeypatch.setattr("pytest_gpuperf.report.watch_run.open_file", lambda _: Full())
    done = monitored(monkeypatch, "--interval", "0.01", "--duration", "0.05", "--output", "x.csv")
    assert (done.code, done.errors) == (1, "gpuperf: x.csv could not be written: No space left on device.\n")
    assert done.output.count(" GPU 0: busy") >= 4
    assert monitored(monkeypatch, "--output", "x.csv", "--", "sh", "-c", "exit 5").code == 5


@contextlib.contextmanager
def started(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """The command as a process of its own, on two fake GPUs."""
    words = [sys.executable, "-c", FAKE, "monitor", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_with_the_summary_and_is_no_failure() -> None:
    with started("--interval", "0.05") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert sum(line.startswith("GPU ") for line in output.splitlines()) == 2


def test_sigterm_ends_with_the_summary_and_the_code_of_the_signal(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    with started("--json", "--interval", "0.05", "--output", str(path)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (143, "")
    assert json.loads(output.splitlines()[-1])["record"] == "summary"
    assert len(path.read_text().splitlines()) > 2


def test_a_kill_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    with started("--interval", "0.01", "--output", str(path)) as process:
        assert process.stdout is not None
        for _ in range(10):
            process.stdout.readline()
        process.kill()
        process.wait(10)
    text = path.read_text()
    assert text.endswith("\n")
    assert {len(row) for row in csv.reader(io.StringIO(text))} == {len(FIELDS)}


def test_a_reader_that_goes_away_ends_the_watch_without_a_traceback() -> None:
    with started("--interval", "0.01") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(10) == 141
        assert process.stderr.read() == ""


def full_disk(*arguments: str, stream: str) -> "subprocess.CompletedProcess[str]":
    """The command with one of its streams on a disk that is full."""
    words = [sys.executable, "-c", FAKE, "monitor", *arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        stdout, stderr = (full if stream == name else subprocess.PIPE for name in ("stdout", "stderr"))
        return subprocess.run(words, stdout=stdout, stderr=stderr, text=True, timeout=30, check=False)


@pytest.mark.parametrize("arguments", [("--json",), ()])
def test_samples_that_cannot_be_written_end_the_watch_with_one_message(arguments: tuple[str, ...]) -> None:
    done = full_disk("--interval", "0.05", "--duration", "20", *arguments, stream="stdout")
    assert (done.returncode, done.stderr) == (
        1,
        "gpuperf: what was seen could not be written: No space left on device.\n",
    )


def test_a_summary_that_cannot_be_written_does_not_change_the_code_of_the_command() -> None:
    done = full_disk("--", "sh", "-c", "echo done; exit 4", stream="stderr")
    assert (done.returncode, done.stdout) == (4, "done\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_forwarded_to_the_command_whose_code_is_returned(number: signal.Signals) -> None:
    script = "trap 'echo caught; exit 9' INT TERM QUIT USR1 USR2; echo ready; while :; do sleep 0.02; done"
    with started("--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (9, "caught\n")
    assert "GPU 0 NVIDIA H100" in errors  # after what the shell says of its own child


def test_a_command_that_is_killed_gives_the_code_of_a_shell() -> None:
    with started("--", "sh", "-c", "echo $$; exec sleep 30") as process:
        assert process.stdout is not None
        os.kill(int(process.stdout.readline()), signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode == 137


class Terminal:
    """A terminal of 80 columns with `gpuperf monitor`, or another program, in its foreground."""

    def __init__(self, *arguments: str, program: Sequence[str] = (sys.executable, "-c", FAKE, "monitor")) -> None:
        self.output = ""
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24", PS1="$ ")
            os.execv(program[0], [*program, *arguments])  # noqa: S606 - what a terminal runs

    def wait_for(self, text: str, limit_s: float = 10.0) -> None:
        end_s = time.monotonic() + limit_s
        while text not in self.output:
            assert time.monotonic() < end_s, self.output
            self._read()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self, limit_s: float = 10.0) -> int:
        """Its exit code."""
        end_s = time.monotonic() + limit_s
        while True:
            self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                with contextlib.suppress(OSError):
                    self._read()
                os.close(self._master)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end_s:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(self.output)

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):
                self.output += os.read(self._master, 65536).decode(errors="replace")


def test_a_terminal_shows_the_view_and_ctrl_c_leaves_the_summary() -> None:
    terminal = Terminal("--interval", "0.05")
    terminal.wait_for("2 x NVIDIA H100 80GB HBM3  every 0.05 s")
    terminal.wait_for("busy: kernels run 50 % of the time")
    terminal.type("\x03")
    assert terminal.end() == 0
    after = terminal.output.rpartition("\x1b[?25h")[2]  # the cursor is shown again, and the view gone
    assert "GPU 1 NVIDIA H100 80GB HBM3:" in after
    assert "Ctrl-C ends" not in after


def test_a_command_has_the_terminal_to_read_from() -> None:
    terminal = Terminal("--", "sh", "-c", "read line; echo got $line; exit 3")
    terminal.type("hello\n")
    assert terminal.end() == 3
    assert "got hello" in terminal.output
    assert "GPU 0 NVIDIA H100" in terminal.output
    assert "Ctrl-C ends" not in terminal.output


def test_a_command_is_in_the_foreground_of_the_terminal() -> None:
    code = "import os, time; time.sleep(0.3); print('foreground', os.tcgetpgrp(0) == os.getpgrp())"
    terminal = Terminal("--", sys.executable, "-c", code)
    assert terminal.end() == 0
    assert "foreground True" in terminal.output


def test_ctrl_z_stops_both_and_fg_lets_both_go_on(tmp_path: Path) -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("there is no bash")
    (tmp_path / "fake.py").write_text(FAKE)
    terminal = Terminal("--norc", "-i", program=(shell,))
    script = 'echo be""gun; read line; echo got $line; exit 6'  # what is typed is not what is waited for
    terminal.type(f"{sys.executable} {tmp_path}/fake.py monitor -- sh -c '{script}'\n")
    terminal.wait_for("begun")
    terminal.type("\x1a")
    terminal.wait_for("Stopped")
    terminal.type("echo in the sh''ell\n")
    terminal.wait_for("in the shell")
    terminal.type("fg; echo then=$?\n")
    terminal.type("hello\n")
    terminal.wait_for("got hello")
    terminal.wait_for("then=6")
    assert "GPU 0 NVIDIA H100" in terminal.output
    terminal.type("exit\n")
    terminal.end()


def test_ctrl_c_goes_to_the_command_that_has_the_terminal() -> None:
    terminal = Terminal("--", "sh", "-c", "trap 'exit 4' INT; echo ready; while :; do sleep 0.02; done")
    terminal.wait_for("ready")
    terminal.type("\x03")
    assert terminal.end() == 4
    assert "GPU 0 NVIDIA H100" in terminal.output


def test_live_shows_the_view_beside_a_command() -> None:
    terminal = Terminal("--live", "--interval", "0.05", "--", "sleep", "0.5")
    terminal.wait_for("busy: kernels run 50 % of the time")
    assert terminal.end() == 0
    assert "  clock held down: never" in terminal.output


def test_a_command_sees_what_it_would_see_by_itself_beside_a_lost_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To watch is to change nothing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, seen = (fake_gpu(0), fake_gpu(1)), tmp_path / "seen"
    machine = Machine("auto", nvml=FakeNvml(*gpus, lost={gpus[0].uuid: 0}))
    plan = Plan(
        interval_s=0.2,
        gpus=None,
        duration_s=None,
        output=None,
        is_json=False,
        is_live=False,
        command=("sh", "-c", f"echo ${{CUDA_VISIBLE_DEVICES-not set}} > {seen}"),
    )
    assert monitor(plan, machine) == 0
    assert seen.read_text() == "not set\n"
