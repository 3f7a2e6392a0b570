"""Run by one or two processes: tests the embedded model on so many puzzles in batches of 3."""

import torch
from dmpo_runs import trainer
from lightning.pytorch.strategies import DDPStrategy

from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, EvaluationReport, SudokuDataModule


def main(processes: int, puzzles: int, output: str) -> dict:
    torch.set_num_threads(1)
    data = SudokuDataModule(
        tokenizer="sudoku_tiny",
        prompts_per_buffer=1,
        evaluation_batch_size=3,
        blanks=(8, 12),
        sizes={"test": puzzles},
        check="published",
        prompt_template="{puzzle}",
    )
    module = DMPO(
        "sudoku_tiny",
        objective=WDCE(reward_temperature=0.1),
        sampler=ConfidenceSampler(denoising_steps=5),
        completion_length=20,
        group_size=4,
        micro_batch_size=4,
        completions_per_prompt=4,
    )
    strategy = DDPStrategy(process_group_backend="gloo") if processes == 2 else "auto"
    run = trainer(output, devices=processes, strategy=strategy, callbacks=[EvaluationReport()])
    run.test(module, data, verbose=False)
    (result,) = module.evaluator.results
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    return {"prompts": result.prompts, "means": result.means, "logged": logged}
