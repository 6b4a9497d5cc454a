#!/usr/bin/env bash
# Measures what only a GPU can show: steps compared with PyTorch's, evaluation, g, NCCL, real JPEGs.
#
#   tools/benchmark/measure_on_gpu.sh OUT [DATA_DIR]
#
# OUT: folder for the results. DATA_DIR: holds a prepared imagenet2012, such as the small one that
# tools.datasets.make_photographs makes; without it the part on real JPEGs is left out. Each part has
# a time limit and its own log, and runs even if the parts before it failed. Exits with the largest
# status of any part.
set -uo pipefail

cd "$(dirname "$0")/../.." || exit
out=${1:?usage: tools/benchmark/measure_on_gpu.sh OUT [DATA_DIR]}
mkdir -p "$out"
worst=0

part() {
  local name=$1 limit=$2
  shift 2
  timeout --signal=KILL "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  echo "$name: status $status"
  ((status > worst)) && worst=$status
}

step() {
  local name=$1
  shift
  part "$name" 420 python3 -m tools.benchmark.step --network=resnet50 --image_size=224 \
    --repeats=5 --steps=20 --json="$out/$name.json" "$@"
}

part devices 120 python3 -c "
import tensorflow as tf
print(tf.config.list_physical_devices('GPU'))
print(tf.random.normal((512, 512)) @ tf.random.normal((512, 512)))"

# A cluster of one task is enough to start NCCL under MultiWorkerMirroredStrategy; the log shows it.
NCCL_DEBUG=INFO part nccl 120 python3 -c "
import tensorflow as tf
options = tf.distribute.experimental.CommunicationOptions(
  implementation=tf.distribute.experimental.CommunicationImplementation.NCCL)
strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
@tf.function
def total():
  def replica():
    return tf.distribute.get_replica_context().all_reduce('SUM', tf.ones([1000]))
  return strategy.run(replica)
print(strategy.num_replicas_in_sync, strategy.extended._communication_options, total()[:3])"

step bfloat16 --dtype=bfloat16 --per_worker_batch_size=32 \
  --contenders=ours,torch_compiled,torch,ours:jit_compile=false,keras
step workers --dtype=bfloat16 --workers=8 --per_worker_batch_size=32 \
  --contenders=ours:workers_per_pass=8,ours:workers_per_pass=1,torch_compiled:workers=1:per_worker_batch_size=256,loop
step float32 --dtype=float32 --per_worker_batch_size=32 --contenders=ours,torch_compiled
step float16 --dtype=float16 --per_worker_batch_size=32 --contenders=ours,torch_compiled
step evaluation --dtype=bfloat16 --per_worker_batch_size=128 \
  --contenders=evaluate:evaluation_dtype=training,evaluate,ours
part tests 300 python3 -m pytest -q tests/training/step_test.py \
  tests/training/workers_per_pass_test.py tests/models/normalization_test.py

if [[ $# -ge 2 ]]; then
  part jpegs 400 python3 -m tf_largebatch.train --dtype=bfloat16 --workers=8 \
    --train_split='train[:4096]' --validation_split='validation[:500]' --epochs=2 \
    --warmup_epochs=1 --decay_epochs=1 --data_dir="$2" --work_dir="$out/run" --log_every_steps=1
fi
exit "$worst"
