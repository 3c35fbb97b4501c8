"""Greedy decoding with transformers: as `generate` does it, bound by the host, and with one CUDA graph a token."""

import pytest
import torch
from planted import planted
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pytest_gpuperf import Device, Recorder

#: What is planted is more tokens made for the same number counted.
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
    made = round(NEW_TOKENS * (1 + planted("decode")))
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


class GraphDecoder:
    """Greedy decoding whose step is one CUDA graph."""

    def __init__(self, model: LlamaForCausalLM, device: str) -> None:
        total = PROMPT_TOKENS + 2 * NEW_TOKENS
        self.model = model
        self.cache = StaticCache(config=SHAPE, max_cache_len=total)
        self.prompt = torch.randint(0, 32000, (BATCH, PROMPT_TOKENS), device=device)
        self.positions = torch.arange(total, device=device)
        self.token = torch.zeros(BATCH, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):  # capturing wants everything initialised, on a stream of its own
            self.prefill()
            self.step()
        side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> None:
        """Add tokens [batch, n] at places [1, n] to the cache, and choose the next token [batch, 1]."""
        mask = self.positions[None, :] <= places[0, :, None]  # [n, cache]
        logits = self.model(
            tokens, position_ids=places, attention_mask=mask[None, None], past_key_values=self.cache, logits_to_keep=1
        ).logits  # [batch, 1, vocabulary]
        self.token.copy_(logits.argmax(-1))

    def prefill(self) -> None:
        """Begin anew with the prompt."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        self.forward(self.prompt, self.positions[None, :PROMPT_TOKENS])
        self.position.fill_(PROMPT_TOKENS)

    def step(self) -> None:
        """One more token."""
        self.forward(self.token, self.position)
        self.position.add_(1)

    def requests(self, count: int, tokens: int) -> None:
        """Prefill and decode `tokens` tokens, `count` times."""
        for _ in range(count):
            self.prefill()
            for _ in range(tokens):
                self.graph.replay()


@pytest.mark.perf(tolerance=0.05)
@pytest.mark.gpu(min_vram_gb=8)
@torch.inference_mode()
def test_decode_graph(gpu: Device, perf: Recorder, model: LlamaForCausalLM) -> None:
    """Eight requests after two to warm up, each a prefill and then the same graph once a token."""
    if gpu.kind == "cpu":
        pytest.skip("CUDA graphs need a GPU.")
    made = round(NEW_TOKENS * (1 + planted("decode")))
    decoder = GraphDecoder(model, gpu.device)
    decoder.requests(2, made)
    with perf.region("decode") as region:
        decoder.requests(8, made)
    perf.record("throughput", 8 * BATCH * NEW_TOKENS / region.time_s, unit="tok/s")
