"""Completions as records, token by token, and in words: on the screen, and in the tables of loggers."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dmpo_lightning.data.mixture import MixtureDataModule
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import PromptBatch, RolloutBuffer, check_counts
from dmpo_lightning.tasks.base import Task
from dmpo_lightning.terminal import printable, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGING = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
"""What Lightning calls of a logger while a run goes on."""


def task_of(datamodule: Any, example: Any) -> Task | None:
    """The task that an example is of, if it is of one."""
    if isinstance(datamodule, MixtureDataModule):
        datamodule = datamodule.datamodules[example["task"]]
    task = getattr(datamodule, "task", None)
    return task if isinstance(task, Task) else None


def rollout_records(
    buffer: RolloutBuffer, tokenizer: "PreTrainedTokenizerBase", datamodule: Any = None
) -> Iterator[dict[str, Any]]:
    """One record for each rollout of a buffer, in the order of the prompts."""
    rollouts = buffer.rollouts
    shape = rollouts.reward.shape
    tokens = (rollouts.completion_ids, rollouts.reveal_step, rollouts.sampled_log_prob)
    facts = token_facts(tokenizer, *(each.flatten(0, 1) for each in tokens))
    targets = {name: value.tolist() for name, value in buffer.targets.items() if value.shape == shape}
    components = {name: value.tolist() for name, value in rollouts.components.items()}
    rewards, keys, indices = rollouts.reward.tolist(), rollouts.keys.tolist(), rollouts.prompts.prompt_index.tolist()
    for row, prompt in enumerate(prompt_texts(tokenizer, rollouts.prompts)):
        example = rollouts.prompts.examples[row]
        task = task_of(datamodule, example)
        difficulty = None if task is None else task.difficulty(example)
        for column, completion in enumerate(rollouts.completions[row]):
            scores = {name: rounded(values[row][column]) for name, values in components.items()}
            yield {
                "buffer": buffer.number,
                "prompt_index": indices[row],
                "rollout": column,
                "reward": rounded(rewards[row][column]),
                "components": {name: score for name, score in scores.items() if score is not None},
                **{name: rounded(values[row][column]) for name, values in targets.items()},
                "key": keys[row][column],
                **({} if difficulty is None else {"difficulty": difficulty}),
                "prompt": prompt,
                "completion": completion,
                **drawings(task, example, completion),
                **facts[row * shape[1] + column],
            }


def example_records(
    evaluated: EvaluatedBatch, batch: PromptBatch, tokenizer: "PreTrainedTokenizerBase", moment: str, datamodule: Any
) -> Iterator[dict[str, Any]]:
    """One record for the first completion of each example of a batch, which is that of the evaluation."""
    prompts, samples = prompt_texts(tokenizer, batch[~batch.is_filler]), evaluated.samples
    several = len(evaluated.completions[0]) if evaluated.completions else 1
    tokens = (samples.completion_ids, samples.reveal_step, samples.log_prob)
    facts = token_facts(tokenizer, *(each[::several] for each in tokens))
    rewards, correct = evaluated.values.scores["reward"][:, 0].tolist(), evaluated.values.correct[:, 0].tolist()
    for row, (index, example) in enumerate(zip(evaluated.prompt_index, evaluated.examples, strict=True)):
        completion = evaluated.completions[row][0]
        yield {
            "moment": moment,
            "prompt_index": index,
            "reward": rounded(rewards[row]),
            "correct": correct[row],
            "prompt": prompts[row],
            "completion": completion,
            **drawings(task_of(datamodule, example), example, completion),
            **facts[row],
        }


def drawings(task: Task | None, example: Any, completion: str) -> dict[str, list[str]]:
    """The task's own pictures of an example and of its answer, if it draws any."""
    try:
        found = [] if task is None else [task.show(example, each) or "" for each in (None, completion)]
    # Completions are anything, and a run is worth more than a picture that somebody's task cannot make of one.
    except Exception:
        found = []
    return {"drawings": found} if any(found) else {}


def token_facts(
    tokenizer: "PreTrainedTokenizerBase", ids: Tensor, steps: Tensor, log_probs: Tensor
) -> list[dict[str, Any]]:
    """What each token of some completions is, when it was revealed and how likely it was then.

    Each tensor is ``[rows length]``.
    """
    # Each token is decoded once.
    different, positions = ids.unique(return_inverse=True)
    texts = tokenizer.batch_decode(different.unsqueeze(-1))
    # Three digits are shown. Rounded in float64, whose shortest decimals the rounded numbers are.
    confidences = log_probs.double().exp().mul(1000).round().div(1000)
    return [
        {"tokens": [str(texts[position]) for position in row], "reveal_step": revealed, "confidence": confidence}
        for row, revealed, confidence in zip(positions.tolist(), steps.tolist(), confidences.tolist(), strict=True)
    ]


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", prompts: PromptBatch) -> list[str]:
    """The prompts as the model read them, without special tokens."""
    batch = prompts.to("cpu")
    kept = [row[mask].tolist() for row, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def rounded(value: float) -> float | None:
    """Six digits, which float32 has, and None for a number that JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def best_and_worst(module: Any, buffer: RolloutBuffer, prompts: int) -> list[dict[str, Any]]:
    """Of the first prompts the completion of the highest reward, and that of the lowest where there is another.

    Each with ``prompt``, ``completion``, ``reward`` and ``weight``, whose mean is 1, and which is 1 without weights.
    """
    rollouts, weight = buffer.rollouts[:prompts], buffer.targets.get("weight")
    texts, shown = prompt_texts(module.policy.tokenizer, rollouts.prompts), []
    for row, rewards in enumerate(rollouts.reward.tolist()):
        ordered = sorted(range(len(rewards)), key=lambda rollout: rewards[rollout])
        for rollout in dict.fromkeys((ordered[-1], ordered[0])):
            said = {"prompt": texts[row], "completion": rollouts.completions[row][rollout], "reward": rewards[rollout]}
            shown.append(said | {"weight": 1.0 if weight is None else float(weight[row, rollout])})
    return shown


def samples_text(module: Any, buffer: RolloutBuffer) -> str:
    """The best and the worst completion of a buffer's first prompt with rewards and weights, to be read on a screen."""
    samples = best_and_worst(module, buffer, prompts=1)
    lines = [f"Rollouts of buffer {buffer.number + 1}:", f"  prompt {shortened(samples[0]['prompt'], 300)}"]
    lines += [
        f"  reward {each['reward']:.3f}, weight {each['weight']:.3f}: {shortened(each['completion'], 300)}"
        for each in samples
    ]
    return "\n".join(lines)


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow prompts with their best and worst completion, in ``completion/text``.

    They are of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself.

    It also lets a run go on whose logger fails, whatever is raised there: services and disks fail in as many ways as
    there are loggers, and a run is worth more than its log. A warning says so at the first failure, and how many there
    were at the end. A logger that cannot begin ends the run.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import LoggingExtras
        >>> trainer = Trainer(callbacks=[LoggingExtras(every_n_buffers=1, prompts=2)])
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts
        self._failures: Counter[str] = Counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._failures.clear()
        for logger in trainer.loggers:
            # Lightning asks the object for them, so that its own attribute comes before the method of its class.
            for name in LOGGING:
                if not isinstance(write := getattr(logger, name), partial):
                    vars(logger)[name] = partial(self._try, logger, write)

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        samples = best_and_worst(module, buffer, self.prompts)
        for logger in trainer.loggers:
            self._try(logger, log_samples, logger, samples, trainer.global_step)

    def _try(self, logger: Any, write: Callable[..., Any], *values: Any, **options: Any) -> Any:
        try:
            return write(*values, **options)
        # See above.
        except Exception as error:
            name = type(logger).__name__
            self._failures[name] += 1
            if self._failures[name] == 1:
                cause = error.__cause__ or error
                rank_zero_warn(f"{name} cannot write ({cause!r}). The run goes on; what is logged is lost there.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, count in self._failures.items():
            rank_zero_warn(f"{name} could not write {count} times in this run.")


def log_samples(logger: Any, samples: Sequence[dict[str, Any]], step: int) -> None:
    """Gives a logger rollouts in words, in the way that it takes them."""
    name, columns = "completion/text", list(samples[0])
    # By name, because none of their packages need be installed.
    kinds = {each.__name__ for each in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_text(name, _markdown(samples), step)
    elif "WandbLogger" in kinds:
        logger.log_table(name, columns=columns, data=[list(each.values()) for each in samples], step=step)
    elif "MLFlowLogger" in kinds:
        table = {column: [each[column] for each in samples] for column in columns}
        # A file for each step: MLflow adds to a table by reading all of it.
        logger.experiment.log_table(logger.run_id, table, f"{name}/step_{step:08}.json")


def _markdown(samples: Sequence[dict[str, Any]]) -> str:
    """TensorBoard reads Markdown, in which completions could be anything: lines of code are shown as they are."""
    parts = []
    for each in samples:
        parts.append(f"reward {each['reward']:.4g}, weight {each['weight']:.4g}")
        for text in (each["prompt"], each["completion"]):
            parts.append("\n".join(f"    {line}" for line in printable(text).split("\n")))
    return "\n\n".join(parts)
