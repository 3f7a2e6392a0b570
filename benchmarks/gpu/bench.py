"""What the sections share: the device, its clock and its memory, and a random model made on it."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.sizes import Size
from benchmarks.samplers import LOGIT_SCALE
from dmpo_lightning import LoRA
from dmpo_lightning.models.llada import LLaDAForMaskedDiffusion
from dmpo_lightning.models.parts import enable_checkpointing
from dmpo_lightning.policy import Policy

PRODUCTS = ("gemm", "gemv", "cutlass", "cublas", "xmma", "nvjet", "aten::mm", "aten::addmm", "aten::bmm")
"""Parts of the names of kernels, and of a processor's operations, that are matrix products."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    ``floor`` is what the best code could reach by the cost model of docs/performance.md, at the card's own measured
    matrix product.
    """

    name: str
    value: float
    unit: str
    floor: float | None = None
    note: str = ""


@dataclass
class Bench:
    """One device and one size."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    products: float = 0.0
    """Floating-point operations per second of the measured matrix product; 0 until that is done."""
    _held: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], *, repeats: int | None = None, warm_up: int = 1) -> float:
        """The median of some runs, the device waited for."""
        for _ in range(warm_up):
            run()
        durations = []
        for _ in range(repeats or self.size.repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            durations.append(time.perf_counter() - start)
        return statistics.median(durations)

    def floor(self, flops: float) -> float | None:
        """Seconds at the measured matrix product."""
        return flops / self.products if self.products else None

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Puts the bytes at the worst moment of what is inside into the list; nothing on a processor."""
        found: list[int] = []
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield found
        if self.on_gpu:
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated())

    def product_share(self, run: Callable[[], Any]) -> float:
        """The share of the device's time that matrix products take."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        with profile(activities=kinds) as profiler:
            run()
            self.synchronize()
        name = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        times = {each.key: getattr(each, name) for each in profiler.key_averages()}
        products = sum(time for key, time in times.items() if any(part in key for part in PRODUCTS))
        return products / max(sum(times.values()), 1e-9)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Words for all ids; the last id is the mask."""
        mask = self.size.vocab_size - 1
        vocabulary = {f"w{number}": number for number in range(mask)} | {"[MASK]": mask}
        words = WordTokenizer(WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", pad_token="w0", eos_token="w0")

    def network(self, *, n_layers: int | None = None, dtype: torch.dtype | None = None) -> LLaDAForMaskedDiffusion:
        """Random weights, made on the device: an 8B model never exists anywhere else."""
        with torch.device("meta"):
            network = LLaDAForMaskedDiffusion(self.size.config(n_layers=n_layers))
        network = network.to(dtype or self.dtype).to_empty(device=self.device)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.ndim == 1:
                    weight.fill_(1.0)
                else:
                    head = "transformer.ff_out" in name
                    weight.normal_(std=LOGIT_SCALE / self.size.d_model**0.5 if head else 0.02)
        return network

    def adapted(self, network: nn.Module, *, checkpointing: bool = False) -> Policy:
        """A policy with adapters that do something."""
        if checkpointing:
            enable_checkpointing(network)
        adapter = LoRA(r=self.size.lora_rank, alpha=64, dropout=0.05)
        model = adapter.apply(network)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.data = weight.data.to(self.dtype)
                if "lora_B" in name:
                    weight.normal_(std=1e-3)
        return Policy(model.train(), self.tokenizer, with_reference=False).to(self.device)

    @property
    def policy(self) -> Policy:
        """The 8B policy with LoRA in the weights' type, as under ``bf16-true``; made once."""
        if "policy" not in self._held:
            self._held["policy"] = self.adapted(self.network())
        return self._held["policy"]

    def release(self) -> None:
        """Gives the room of the shared policy back."""
        self._held.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def prompts(self, rows: int) -> tuple[Tensor, Tensor]:
        """One prompt, for each of the rows."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.size.vocab_size - 1, (1, self.size.prompt_length), generator=generator)
        ids = ids.expand(rows, -1).contiguous().to(self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)
