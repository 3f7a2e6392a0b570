"""DMPO inside an existing Lightning project: your model, tokenizer, prompts and reward, in a plain Trainer.fit."""

import torch
from lightning.pytorch import Trainer

from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, PromptLoader, load_model, load_tokenizer


def reward(example: dict[str, str], completion: str) -> float:
    """Share of the wanted digit among the characters written; any function of an example and a text will do."""
    return completion.count(example["digit"]) / max(len(completion), 1)


def main(max_steps: int = 20) -> DMPO:
    tokenizer = load_tokenizer("sudoku_tiny")
    prompts = [{"prompt": f"{digit}0" * 4, "digit": digit} for digit in "1234"]
    module = DMPO(
        Backbone(load_model("sudoku_tiny"), tokenizer=tokenizer),
        objective=WDCE(reward_temperature=0.1, baseline="group"),
        sampler=ConfidenceSampler(denoising_steps=4),
        completion_length=8,
        group_size=8,
        micro_batch_size=32,
        num_iterations=2,
        reward=reward,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    trainer = Trainer(accelerator="cpu", max_steps=max_steps, gradient_clip_val=1.0, logger=False)
    trainer.fit(module, PromptLoader(prompts, tokenizer, batch_size=4))
    return module


if __name__ == "__main__":
    main()
