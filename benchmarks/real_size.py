"""Runs a recipe on a model of published size: start-up, peak memory beside `plan`'s, checkpoint and resumed run.

    python -m benchmarks.real_size --data GSM8K_FOLDER --model llada

writes random weights in the published layout and sharding (16 GB for `llada` and `sdar`), and then runs two processes
of ``dmpo-lightning fit --config gsm8k.yaml``: one optimizer step on two rollouts of 32 tokens, and a second one that
continues from its checkpoint. Memory is what the operating system counts for the process, sampled ten times a second.
Files that it has mapped, weights among them, count as far as they were touched. The tokenizer is trained on the prompts
of the data, so that they have as many tokens as usual.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

import dmpo_lightning.models  # noqa: F401  makes the families known

GIB, SHARD = 2**30, 5e9
TINY = {
    "llada": {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96},
    "sdar": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 96, "head_dim": 16},
}
SHORT = """--trainer.accelerator cpu --trainer.devices 1 --trainer.limit_val_batches 0 --trainer.num_sanity_val_steps 0
--trainer.accumulate_grad_batches 1 --model.completion_length 32 --model.group_size 2 --model.micro_batch_size 2
--model.num_iterations 1 --model.rows_per_forward 2 --model.sampler.denoising_steps 8 --data.evaluation_batch_size 1
--model.objective.replicates 2 --model.objective.estimator.samples 2 --model.objective.uninformative_groups train"""
"""What makes a recipe for eight large GPUs as short as can be. Two rollouts of random weights have equal rewards."""


@dataclass
class Watched:
    """What the operating system said of a process, in bytes and seconds."""

    seconds: float = 0.0
    loaded_after: float = 0.0
    """Seconds until the line that says which model was loaded."""
    peak: float = 0.0
    peak_while_loading: float = 0.0


def write_model(folder: Path, name: str, changes: dict[str, Any], prompts: Sequence[str]) -> int:
    """Writes random bfloat16 weights with an index and a tokenizer, shard by shard, and returns their bytes."""
    config = AutoConfig.for_model(name, **changes)
    with torch.device("meta"):
        shapes = AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    for key, tensor in shapes.items():
        if sum(each.nbytes for each in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][key] = tensor
    files = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        random = {key: torch.empty(each.shape, dtype=torch.bfloat16).normal_(std=0.02) for key, each in shard.items()}
        for key, tensor in random.items():
            if "norm" in key or key.endswith("ln_f.weight"):
                tensor.fill_(1)
        save_file(random, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    total = sum(each.nbytes for each in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    write_tokenizer(folder, prompts)
    return total


def write_tokenizer(folder: Path, prompts: Sequence[str]) -> None:
    """A byte-level tokenizer of 4096 tokens, trained on the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(prompts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def watch(command: Sequence[str], log: Path) -> Watched:
    """Runs a command, whose lines go into a file, and follows its memory. Raises RuntimeError where it fails."""
    seen, started = Watched(), time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, env=environment)
    while process.poll() is None:
        time.sleep(0.1)
        resident = _resident(process.pid)
        seen.peak = max(seen.peak, resident)
        if not seen.loaded_after:
            seen.peak_while_loading = max(seen.peak_while_loading, resident)
            if "\nModel " in log.read_text(errors="replace"):
                seen.loaded_after = time.monotonic() - started
    seen.seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"The run failed, see {log}.")
    return seen


def _resident(process: int) -> float:
    """Bytes of a process in memory, files that it has mapped included."""
    try:
        return float(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def run(name: str, data: Path, folder: Path, changes: dict[str, Any], options: Sequence[str] = ()) -> dict[str, float]:
    """All that the table shows, in GiB and seconds."""
    with (data / "train.jsonl").open() as lines:
        prompts = [json.loads(line)["question"] for line in lines]
    model = folder / name
    if not (model / "tokenizer.json").is_file():
        write_model(model, name, changes, prompts)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    ours = [sys.executable, "-m", "dmpo_lightning"]
    overlay = ["--config", "overlays/sdar.yaml"] if name == "sdar" else []
    recipe = ["--config", "gsm8k.yaml", *overlay, *SHORT.split(), "--data.path", str(data), *options]
    recipe += ["--model.model", str(model)]
    planned = subprocess.run(
        [*ours, "plan", *recipe, "--trainer.max_steps", "1", "--json"], capture_output=True, text=True, check=True
    )
    plan = json.loads(planned.stdout.splitlines()[-1])["memory_per_gpu"]["required"]
    runs = folder / f"{name}_runs"
    shutil.rmtree(runs, ignore_errors=True)
    fit = [*ours, "fit", *recipe, "--trainer.logger.save_dir", str(runs)]
    first = watch([*fit, "--trainer.max_steps", "1"], folder / f"{name}.log")
    [checkpoint] = [path for path in runs.rglob("last.ckpt") if "latest" not in path.parts]
    written = checkpoint.stat().st_size
    second = watch([*fit, "--trainer.max_steps", "2", "--ckpt_path", str(checkpoint)], folder / f"{name}_resumed.log")
    return {
        "weights": size / GIB,
        "plan": plan / GIB,
        "peak": first.peak / GIB,
        "peak while loading": first.peak_while_loading / GIB,
        "checkpoint": written / GIB,
        "start-up": first.loaded_after,
        "one step": first.seconds,
        "peak resumed": second.peak / GIB,
        "resumed step": second.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the measured numbers of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/real_size"), help="where the weights are written")
    parser.add_argument("--model", choices=sorted(TINY), default="llada")
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, which proves nothing but the code")
    given = parser.parse_args(arguments)
    options = ["--model.model.quantization", "nf4"] if given.nf4 else []
    folder = given.folder / "tiny" if given.tiny else given.folder
    changes = TINY[given.model] if given.tiny else {}
    for name, value in run(given.model, given.data, folder, changes, options).items():
        unit = "s" if name in ("start-up", "one step", "resumed step") else "GiB"
        print(f"{name:20} {value:8.2f} {unit}", flush=True)


if __name__ == "__main__":
    main()
