#!/bin/bash
# Without SLURM: run this on each node, with NODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (the first node) set. The same command again
# continues the run. torchrun passes SIGTERM on and kills the ranks 30 seconds later: where that is too soon for a save, the run continues
# from the last regular checkpoint.
set -euo pipefail

torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-8}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m dmpo_lightning fit --config gsm8k.yaml --config strategies/ddp.yaml \
  --model.model "${MODEL:?the folder of LLaDA-8B-Instruct}" \
  --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-8}" \
  --ckpt_path last
