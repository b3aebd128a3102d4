#!/bin/sh
# One machine, all of its GPUs: sh examples/multi_gpu/run.sh MODEL TEXTS OUT
set -e
GPUS="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
exec torchrun --standalone --nproc-per-node "$GPUS" -m examples.multi_gpu.prune "$@"
