#!/bin/bash
# Without SLURM: run this on each node, with NODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (the first node) set. The same command again
# continues the run. torchrun passes SIGTERM on and kills the ranks 30 seconds later: where that is too soon for a save, the run continues
# from the last regular checkpoint.
set -euo pipefail

# The environment in which dmpo-lightning is installed. Nodes often have no network: model and data are folders, and no hub is asked.
source "${ENVIRONMENT:?the folder of a virtual environment}/bin/activate"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-8}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m dmpo_lightning fit --config gsm8k.yaml --config strategies/ddp.yaml \
  --model.model "${MODEL:?the folder of LLaDA-8B-Instruct}" --data.path "${DATA:?the folder of the data, with train.jsonl}" \
  --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-8}" \
  --ckpt_path last
