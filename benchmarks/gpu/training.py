"""Training steps and whole buffers, measured against `plan`."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from transformers import AutoModelForMaskedLM

from benchmarks.gpu.bench import Bench, Figure
from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, ElboEstimator, LoRA, PromptLoader
from dmpo_lightning.models.parts import compile_layers, enable_checkpointing, layers_of
from dmpo_lightning.planning.memory import rehearsed
from dmpo_lightning.planning.network import quantize, stand_in_tokenizer
from dmpo_lightning.planning.run import Run
from dmpo_lightning.planning.strategy import Sharding
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows
from dmpo_lightning.schedule import Schedule

GIB = 2**30
ROOM_LEFT = 0.1
"""Share of a card that the largest model leaves free, for the allocator."""


def room(bench: Bench) -> float:
    """Bytes that can be used."""
    return torch.cuda.mem_get_info()[0] * (1 - ROOM_LEFT) if bench.on_gpu else float("inf")


def objective(bench: Bench) -> WDCE:
    """The recipe's."""
    return WDCE(
        reward_temperature=0.04,
        baseline="group",
        replicates=bench.size.replicates,
        estimator=ElboEstimator(bench.size.elbo_samples),
        weight_tolerance=0.0,
    )


def sampler(bench: Bench) -> ConfidenceSampler:
    """The recipe's, with a dual cache."""
    size = bench.size
    return ConfidenceSampler(
        block_length=size.block_length,
        denoising_steps=size.denoising_steps,
        temperature=size.temperature,
        cache="dual",
    )


def planned(
    bench: Bench,
    *,
    n_layers: int | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    phases: tuple[str, ...] = ("training", "optimizer step"),
    **changes: Any,
) -> float:
    """Bytes at the worst moment of some phases by `plan`, what stays included. ``changes`` are of the `Backbone`."""
    size = bench.size
    config = size.config(n_layers=n_layers)
    options = {"adapter": LoRA(r=size.lora_rank, alpha=64, dropout=0.05), "gradient_checkpointing": True} | changes
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config, dtype=dtype or bench.dtype)
        if options.get("quantization"):
            quantize(model)
        module = DMPO(
            Backbone(model, tokenizer=stand_in_tokenizer(config), **options),
            objective=objective(bench),
            sampler=sampler(bench),
            completion_length=size.completion_length,
            group_size=size.group_size,
            micro_batch_size=size.micro_batch_size,
        )
    schedule = Schedule(
        group_size=size.group_size,
        prompts_per_buffer=1,
        micro_batch_size=size.micro_batch_size,
        num_iterations=size.num_iterations,
        accumulation=size.group_size // size.micro_batch_size,
    )
    precision = precision or ("bf16-true" if bench.dtype == torch.bfloat16 else "32-true")
    lengths = size.prompt_length, size.completion_length
    memory = rehearsed(
        Run(size.name, module, schedule, *lengths, Sharding("alone"), precision, on_cpu=not bench.on_gpu)
    )
    stays = sum(memory.resident.values()) - memory.resident["reference"]
    return stays + max(memory.phases[name].peak for name in phases)


def rows_of(bench: Bench) -> tuple[RolloutRows, dict[str, torch.Tensor]]:
    """A micro-batch of random rollouts with signals of both signs."""
    size, rows = bench.size, bench.size.micro_batch_size
    ids, mask = bench.prompts(rows)
    completions = torch.randint(1, size.vocab_size - 1, (rows, size.completion_length), device=bench.device)
    keys = torch.arange(rows, device=bench.device)
    signal = torch.linspace(-1, 1.5, rows, device=bench.device)
    return RolloutRows(ids, mask, completions, keys, torch.zeros_like(completions), 1.0), {"signal": signal}


def measured_step(bench: Bench, policy: Policy, name: str, plan: float, *, passes: float) -> Iterator[Figure]:
    """Forward, backward pass and optimizer step; ``passes`` counts forwards' worth of products in the floor."""
    size, loss = bench.size, objective(bench)
    rows, targets = rows_of(bench)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=size.learning_rate)
    half = torch.autocast(bench.device.type, torch.bfloat16, enabled=trained[0].dtype != bench.dtype)

    def step() -> None:
        with half:
            value, _ = loss.loss(policy, rows, targets, iteration=0, planned_rollouts=len(rows))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with bench.peak() as peak:
        seconds = bench.seconds(step, repeats=3, warm_up=0)
    tokens = len(rows) * size.replicates * size.length
    flops = passes * size.flops(tokens, rows=len(rows) * size.replicates, attended=size.length)
    floor = bench.floor(flops)
    yield Figure(f"training step, {name}", 1e3 * seconds, "ms", None if floor is None else 1e3 * floor)
    if peak:
        ratio = plan / peak[0]
        yield Figure(f"peak memory, {name}", peak[0] / GIB, "GiB", plan / GIB, f"plan / measured {ratio:.2f}")


def training_step(bench: Bench, name: str, *, checkpointing: bool = False, compiled: bool = False) -> Iterator[Figure]:
    """With LoRA. The frozen weights take no gradient, so a backward pass costs one forward."""
    plan = planned(bench, gradient_checkpointing=checkpointing)
    if plan > room(bench):
        yield Figure(f"training step, LoRA, {name}: not run, planned", plan / GIB, "GiB", note="more than there is")
        return
    network = bench.network()
    policy = bench.adapted(network, checkpointing=checkpointing)
    if compiled:
        compile_layers(policy.model)
    yield from measured_step(bench, policy, f"LoRA, {name}", plan, passes=3 if checkpointing else 2)


def quantized(bench: Bench) -> Iterator[Figure]:
    """The blocks' layers in NF4, as they come from loading in 4 bits."""
    import bitsandbytes

    network = bench.network()
    for block in layers_of(network):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                four = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=bench.dtype, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(block, name, four.to(bench.device))
    network.is_loaded_in_4bit = True  # type: ignore[assignment]
    policy = bench.adapted(network, checkpointing=True)
    plan = planned(bench, quantization="nf4")
    yield from measured_step(bench, policy, "QLoRA, checkpointed", plan, passes=3)


def full_fine_tuning(bench: Bench) -> Iterator[Figure]:
    """Float32 weights computed in bfloat16, as in overlays/full_finetuning.yaml; without the reference's copy."""
    options: dict[str, Any] = {"adapter": None, "dtype": torch.float32, "precision": "bf16-mixed"}
    layers = bench.size.n_layers
    while layers > 1 and planned(bench, n_layers=layers, **options) > room(bench):
        layers -= 1
    network = bench.network(n_layers=layers, dtype=torch.float32)
    enable_checkpointing(network)
    policy = Policy(network.train(), bench.tokenizer, with_reference=False).to(bench.device)
    plan = planned(bench, n_layers=layers, **options)
    passes = 4 * layers / bench.size.n_layers
    yield from measured_step(bench, policy, f"all weights of {layers} layers, checkpointed", plan, passes=passes)


class RecordedBuffer:
    """One buffer of the recipe by `DMPO` and the Trainer, on the shared random weights."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def figures(self) -> Iterator[Figure]:
        bench, size = self.bench, self.bench.size
        module, loader, clock = self._module(), self._loader(), Clock(bench)
        steps = size.num_iterations
        trainer = Trainer(
            accelerator="gpu" if bench.on_gpu else "cpu",
            devices=1,
            precision="bf16-true" if bench.dtype == torch.bfloat16 else "32-true",
            max_steps=2 * steps,
            accumulate_grad_batches=size.group_size // size.micro_batch_size,
            gradient_clip_val=0.2,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        with bench.peak() as peak:
            trainer.fit(module, loader)
        # The first buffer is the warm-up of kernels and allocator.
        first, rest = clock.seconds[clock.per_buffer], clock.seconds[clock.per_buffer + 1 :]
        whole = first + sum(rest)
        yield Figure("whole buffer, dual cache", whole, "s", note=f"the passes' other steps {sum(rest):.1f} s")
        yield Figure("whole buffer, the first", sum(clock.seconds[: clock.per_buffer]), "s")
        if peak:
            plan = planned(bench, phases=("training", "optimizer step", "sampling", "scoring"))
            yield Figure("peak memory, whole buffer", peak[0] / GIB, "GiB", plan / GIB)

    def _module(self) -> DMPO:
        bench, size = self.bench, self.bench.size
        network = bench.network()
        adapter = LoRA(r=size.lora_rank, alpha=64, dropout=0.05)
        return DMPO(
            Backbone(network, tokenizer=bench.tokenizer, adapter=adapter, gradient_checkpointing=True),
            objective=objective(bench),
            sampler=sampler(bench),
            completion_length=size.completion_length,
            group_size=size.group_size,
            micro_batch_size=size.micro_batch_size,
            num_iterations=size.num_iterations,
            rows_per_forward=size.group_size,
            reward=lambda example, completion: sum(map(ord, completion)) % 97 / 97,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=size.learning_rate),
        )

    def _loader(self) -> PromptLoader:
        size = self.bench.size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, size.vocab_size - 1, (2, size.prompt_length), generator=generator)
        prompts = [{"prompt": " ".join(f"w{each}" for each in row)} for row in ids.tolist()]
        return PromptLoader(prompts, self.bench.tokenizer, batch_size=1)


class Clock(Callback):
    """Seconds of each training batch, the device waited for; the first of a buffer samples and scores too."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seconds: list[float] = []
        size = bench.size
        self.per_buffer = size.num_iterations * (size.group_size // size.micro_batch_size)

    def on_train_batch_start(self, *_: Any) -> None:
        self.bench.synchronize()
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.bench.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
