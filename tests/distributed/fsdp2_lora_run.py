"""Run by two processes: a few steps of DMPO under LoRA, on DDP or FSDP2; rank 0 writes what it saw as JSON."""

import json
import sys

import torch
from dmpo_runs import Recorder, digit_share, loader, trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, LoRA, WinoSampler
from dmpo_lightning.policy import evaluating
from helpers import prompt_batch

SAMPLERS = {
    "static": lambda: ConfidenceSampler(denoising_steps=4),
    "threshold": lambda: ConfidenceSampler(block_length=4, threshold=0.6),
    "early exit": lambda: ConfidenceSampler(block_length=2, threshold=0.6, early_exit=True),
    "wino": lambda: WinoSampler(block_length=4),
}


def main(kind: str, sampler: str, refresh: str, output: str) -> None:
    torch.set_num_threads(1)
    strategies = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        ),
    }
    dmpo = DMPO(
        "sudoku_tiny",
        objective=WDCE(reward_temperature=0.1, replicates=2),
        sampler=SAMPLERS[sampler](),
        completion_length=8,
        group_size=4,
        micro_batch_size=4,
        num_iterations=2,
        reference_refresh_interval=int(refresh) or None,
        reward=digit_share,
        adapter=LoRA(r=4, alpha=8, dropout=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        seed=3,
    )
    with torch.no_grad():
        for name, parameter in dmpo.policy.named_parameters():
            if ".lora_B." in name:  # a policy that differs from its reference
                parameter.copy_(torch.linspace(-0.02, 0.02, parameter.numel()).view_as(parameter))
    record = Recorder()
    run = trainer(".", max_steps=3, callbacks=[record], strategy=strategies[kind](), devices=2)
    run.fit(dmpo, loader())
    prompts = prompt_batch(dmpo.policy, ["0012"])
    with evaluating(dmpo.policy):
        values = {
            name: dmpo.policy.logits(prompts.prompt_ids, prompts.prompt_mask, torch.tensor([3, 9]), reference=reference)
            for name, reference in (("policy", False), ("reference", True))
        }
    for unit in (part for part in dmpo.policy.modules() if isinstance(part, FSDPModule)):
        unit.reshard()  # the root stays gathered after a forward
    sharded = [name for name, p in dmpo.policy.named_parameters() if isinstance(p, DTensor)]
    total = len(list(dmpo.policy.named_parameters()))
    facts = {"losses": record.losses, "sharded": len(sharded), "parameters": total}
    facts |= {name: value.clamp(min=-1e9).flatten().tolist() for name, value in values.items()}
    with open(f"{output}.{run.global_rank}", "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
