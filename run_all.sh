#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
#
# Makes the results table: METHODS x SEEDS at one setting, and their teachers (in a table of their
# own, where they have another network). Finished runs are skipped, unfinished ones continue.
# Relative paths are those of the folder from which it is called; EXTRA is split at spaces. Copies
# of this script that share RUNS divide the runs among them: each run is made by the copy that locks
# its folder first. Change what it does from the environment:
#
#   ./run_all.sh                                                   ResNet-32, 200 epochs, 3 seeds
#   TEACHER=resnet20 STUDENT=resnet20 EPOCHS=30 ./run_all.sh       a quicker setting
#   METHODS=cbd EXTRA="--num-teachers 4" ./run_all.sh              one row more
#   METHODS=kd EXTRA="--teacher-method bsce" ./run_all.sh          another
#   METHODS=krdistill EXTRA="--gamma 0" ./run_all.sh               our reconstruction, logits alone
#   DATASET=cifar10 IMB=50 SEEDS="0 1 2 3 4" ./run_all.sh          another setting
#   for i in 1 2; do OMP_NUM_THREADS=1 ./run_all.sh & done; wait   a CPU with two cores
#   for gpu in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$gpu ./run_all.sh > gpu$gpu.log & done; wait
#   EXTRA="--device cuda --precision bf16" sbatch --array=0-7 --gpus=1 run_all.sh         Slurm
#
# With Slurm all nodes share RUNS, on a file system that locks between nodes (not all do), and
# --precision keeps GPUs of different kinds at the same runs: fp32, where one of them has no bf16.
set -uo pipefail
METHODS=${METHODS:-kd cbd dive bkd krdistill} SEEDS=${SEEDS:-0 1 2}
DATASET=${DATASET:-cifar100} IMB=${IMB:-} EPOCHS=${EPOCHS:-200}
TEACHER=${TEACHER:-} STUDENT=${STUDENT:-resnet32}
RUNS=${RUNS:-runs} PYTHON=${PYTHON:-python} EXTRA=${EXTRA:-}
program=$(dirname "$0")/kd_lt.py
[ -f "$program" ] || program=kd_lt.py # Slurm runs a copy of this script from elsewhere
"$PYTHON" -c "import torch" || exit
busy=0 failed=0
for seed in $SEEDS; do
  for method in $METHODS; do
    command=("$PYTHON" "$program" --method "$method" --dataset "$DATASET"
      --student "$STUDENT" --epochs "$EPOCHS" --seed "$seed" --runs-dir "$RUNS")
    [ -z "$IMB" ] || command+=(--imb "$IMB")
    case "$method $EXTRA" in
      "ce "* | "bsce "* | *--teacher-checkpoint*) ;; # they refuse --teacher
      *) [ -z "$TEACHER" ] || command+=(--teacher "$TEACHER") ;;
    esac
    # shellcheck disable=SC2206
    command+=($EXTRA)
    echo "+ ${command[*]}"
    "${command[@]}"
    status=$?
    case $status in
      0) ;;
      75) busy=$((busy + 1)) ;; # another copy has it
      130 | 143) exit $status ;; # Ctrl-C, or killed
      *) failed=$((failed + 1)) && echo "failed with status $status: ${command[*]}" >&2 ;;
    esac
  done
done
[ $busy -eq 0 ] || echo "$busy runs were left to other copies: the table has the finished ones"
echo "+ $PYTHON $program --table $RUNS"
"$PYTHON" "$program" --table "$RUNS" || [ $busy -gt 0 ] || exit
[ $failed -eq 0 ]
