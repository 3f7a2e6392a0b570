#!/bin/bash
# Without SLURM: run this on each node, with NODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (the first node) set. The same command again
# continues the run. torchrun passes SIGTERM on and kills the ranks 30 seconds later, which may be too soon for a save; SIGUSR1 to the ranks
# themselves (`pkill -USR1 -f "dmpo_lightning fit"` on each node) leaves them the time they need.
set -euo pipefail

torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-8}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m dmpo_lightning fit --config gsm8k.yaml --config strategies/ddp.yaml \
  --model.model "${MODEL:?the folder of LLaDA-8B-Instruct}" \
  --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-8}" \
  --ckpt_path last
