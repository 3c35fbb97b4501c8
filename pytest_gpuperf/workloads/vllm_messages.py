"""What this process and the one that vLLM runs in say to each other: one JSON object a line."""

from typing import Literal

import msgspec

from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load


class Start(Record, frozen=True, kw_only=True, tag="start"):
    """First of all: load a model.

    Attributes:
        arguments: Of `vllm.LLM`.
        profile_folder: Where traces go; `None`: nothing will be profiled.
    """

    arguments: dict[str, object]
    profile_folder: str | None


class Generate(Record, frozen=True, kw_only=True, tag="generate"):
    """Generate a load and time it."""

    load: Load


class Profile(Record, frozen=True, kw_only=True, tag="profile"):
    """Generate a load under the profiler.

    Attributes:
        keep: File for the trace of the first rank; `None`: none is kept.
    """

    load: Load
    keep: str | None = None


class Stop(Record, frozen=True, kw_only=True, tag="stop"):
    """Shut the engine down and end."""


class Ready(Record, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded.

    Attributes:
        load_time_s: What building `vllm.LLM` took: weights, memory profiling, compilation, CUDA graphs.
        version: Of vLLM.
        blocks: Of the KV cache, on each GPU.
        block_size: Tokens of a block.
        vocab: Token ids are below it.
        max_model_len: Tokens that a sequence may have.
        has_steps: Whether this version tells what its scheduler does.
        resolved: Settings as vLLM has resolved them.
    """

    load_time_s: float
    version: str
    blocks: int
    block_size: int
    vocab: int
    max_model_len: int
    has_steps: bool
    resolved: dict[str, str]


class Generated(Record, frozen=True, kw_only=True, tag="generated"):
    """How it went."""

    generation: Generation


class Profiled(Record, frozen=True, kw_only=True, tag="profiled"):
    """What the GPUs did; `None` without a GPU."""

    gpu: GpuTime | None


class Stopped(Record, frozen=True, kw_only=True, tag="stopped"):
    """The engine is shut down."""


class Refused(Record, frozen=True, kw_only=True, tag="refused"):
    """It did not work.

    Attributes:
        kind: `argument`: the user's mistake, found before anything was started; `configuration`: vLLM's own checks;
            `failure`: anything else.
        message: What vLLM said.
    """

    kind: Literal["argument", "configuration", "failure"]
    message: str


Command = Start | Generate | Profile | Stop
Reply = Ready | Generated | Profiled | Stopped | Refused


_COMMANDS = msgspec.json.Decoder(Command)
_REPLIES = msgspec.json.Decoder(Reply)


def to_line(message: Command | Reply) -> bytes:
    """Write a message as one line."""
    return msgspec.json.encode(message) + b"\n"


def command_of(line: bytes) -> Command:
    """Read a command.

    Raises:
        msgspec.DecodeError: It is none.
    """
    command: Command = _COMMANDS.decode(line)
    return command


def reply_of(line: bytes) -> Reply:
    """Read a reply.

    Raises:
        msgspec.DecodeError: It is none.
    """
    reply: Reply = _REPLIES.decode(line)
    return reply
