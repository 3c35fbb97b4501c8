"""Greedy decoding with transformers: as `generate` does it, bound by the host, and with one CUDA graph a token."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pytest_gpuperf import Device, Recorder

#: Work made larger by this fraction: more tokens made for the same number counted.
PLANTED = float(os.environ.get("GPUPERF_PLANTED", "0"))
BATCH, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 128
#: The shape of TinyLlama-1.1B.
SHAPE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random weights, the same in every process."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return LlamaForCausalLM(SHAPE).to(torch.bfloat16).eval()


@pytest.mark.perf(tolerance=0.05)
@torch.inference_mode()
def test_generate(gpu: Device, perf: Recorder, model: LlamaForCausalLM) -> None:
    """`model.generate`: each step launches its kernels from Python."""
    made = round(NEW_TOKENS * (1 + PLANTED))
    prompt = torch.randint(0, 32000, (BATCH, PROMPT_TOKENS), device=gpu.device)

    def generate(tokens: int) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    generate(16)
    with perf.region("generate") as region:
        generate(made)
    perf.record("throughput", BATCH * NEW_TOKENS / region.time_s, unit="tok/s")


@pytest.mark.perf(tolerance=0.05)
@pytest.mark.gpu(min_vram_gb=8)
@torch.inference_mode()
def test_decode_graph(gpu: Device, perf: Recorder, model: LlamaForCausalLM) -> None:
    """Ten requests after a warm-up, each a prefill and then the same graph once a token."""
    made = round(NEW_TOKENS * (1 + PLANTED))
    total = PROMPT_TOKENS + 2 * NEW_TOKENS
    cache = StaticCache(config=SHAPE, max_cache_len=total)
    prompt = torch.randint(0, 32000, (BATCH, PROMPT_TOKENS), device=gpu.device)
    positions = torch.arange(total, device=gpu.device)
    causal = positions[None, :] <= positions[:PROMPT_TOKENS, None]
    token = torch.zeros(BATCH, 1, dtype=torch.long, device=gpu.device)
    position = torch.zeros(1, 1, dtype=torch.long, device=gpu.device)
    if gpu.kind == "cpu":
        pytest.skip("CUDA graphs need a GPU.")

    def forward(tokens: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> None:
        # mask: [1, 1, tokens, cache]; logits: [batch, 1, vocabulary]
        logits = model(
            tokens, position_ids=places, attention_mask=mask[None, None], past_key_values=cache, logits_to_keep=1
        ).logits
        token.copy_(logits.argmax(-1))

    def prefill() -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        forward(prompt, positions[None, :PROMPT_TOKENS], causal)
        position.fill_(PROMPT_TOKENS)

    def step() -> None:
        forward(token, position, positions[None, :] <= position)
        position.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        prefill()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def request() -> None:
        prefill()
        for _ in range(made):
            graph.replay()

    for _ in range(3):
        request()
    with perf.region("decode") as region:
        for _ in range(10):
            request()
    perf.record("throughput", 10 * BATCH * NEW_TOKENS / region.time_s, unit="tok/s")
