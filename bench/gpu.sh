#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes and without a network: the build, the GPU tests,
# compute-sanitizer and the benchmarks, each stage under its own time limit, the most important first. A stage that
# fails stops none of the others. Results go to the folder OUT: summary.json, gpu.log, sanitizer.log, tests.xml and a
# JSON file a benchmark. Python needs torch, setuptools, ninja and pytest; nvcc must be there.
#
#   OUT                   where to write, by default bench/results/gpu
#   PYTHON                the interpreter, by default python3
#   BUDGET                seconds for all, by default 540; a stage that comes too late is not started
#   CUTLASS_HOME          the folder above CUTLASS's include, unless the package nvidia-cutlass is installed
#   TORCH_CUDA_ARCH_LIST  what to build for, by default the first device's compute capability
#   MNIST_DIR             a folder of MNIST's IDX files for the training runs, by default scikit-learn's digits
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-540}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
log=$OUT/gpu.log
rm -f "$OUT"/{summary,teleport,layer,roofline,training}.json "$OUT"/{sanitizer.log,tests.xml}
: >"$log"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

stages=()
failed=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# stage NAME SECONDS COMMAND...: runs the command into the log, shows its last lines, notes its exit status and time.
stage() {
    local name=$1 limit=$2 begun=$SECONDS status
    shift 2
    [ "$limit" -le $((BUDGET - SECONDS)) ] || limit=$((BUDGET - SECONDS))
    printf '=== %s\n' "$name" | tee -a "$log"
    if [ "$limit" -lt 5 ]; then
        printf 'not started: the time is used up\n' | tee -a "$log"
        status=124
    else
        timeout --kill-after=5 "$limit" "$@" >"$output" 2>&1
        status=$?
        cat "$output" >>"$log"
        tail -n 6 "$output" | cut -c 1-240
    fi
    [ "$status" -eq 0 ] || failed=1
    stages+=("{\"name\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begun))}")
    local IFS=,
    printf '{"stages": [%s]}\n' "${stages[*]}" >"$OUT/summary.json"
}

# What the stages run; `timeout` starts a program, so each is one of bash.
machine='"$PYTHON" -c "
import torch
from bench.harness import machine_line
assert torch.cuda.is_available(), \"torch sees no CUDA device\"
properties = torch.cuda.get_device_properties(0)
print(machine_line(torch.device(\"cuda\"), torch.float32))
print(properties.multi_processor_count, \"multiprocessors,\", properties.total_memory >> 30, \"GiB,\",
      properties.L2_cache_size >> 20, \"MiB of L2, compute capability\", properties.major, properties.minor)
" && nvidia-smi && nvcc --version'

capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>>"$log") || capability=9.0
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} FORCE_CUDA=1
build='"$PYTHON" -m pip install --verbose --no-build-isolation --no-deps --no-index --editable . &&
"$PYTHON" -m symtele_cuda info'

# One process a file, side by side: what breaks a process's context, as a bad address does, breaks no other's tests.
tests='
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), \"torch sees no CUDA device\"" || exit 1
folder=$(mktemp -d) pids=
for file in $(grep -l "mark\.gpu" tests/test_*.py); do
    name=$folder/$(basename "$file" .py)
    "$PYTHON" -m pytest -m gpu "$file" -q -p no:cacheprovider --junitxml="$name.xml" >"$name.log" 2>&1 &
    pids="$pids $!"
done
collect() {
    cat "$folder"/*.log
    {
        echo "<testsuites>"
        sed -E "s/<\?xml[^>]*>//g; s/<\/?testsuites[^>]*>//g; s/ hostname=\"[^\"]*\"//g" "$folder"/*.xml
        echo "</testsuites>"
    } >"$OUT/tests.xml"
    tail -qn 1 "$folder"/*.log
    rm -r "$folder"
}
trap "collect; exit 124" TERM
status=0
for pid in $pids; do wait "$pid" || status=1; done
collect
exit $status'

# Memory straight from the driver for memcheck and initcheck: torch's own allocator hands out blocks larger than asked
# for and used before, in which an access past the end, or to what nobody wrote, cannot be seen.
sanitizer='
watch() {
    name=$1 tool=$2
    shift 2
    printf "=== %s\n" "$name" >"$folder/$name"
    env "$@" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m bench.sanitize $arguments \
        >>"$folder/$name" 2>&1
}
folder=$(mktemp -d)
arguments=
watch memcheck memcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1 & pids=$!
watch initcheck initcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1 & pids="$pids $!"
watch racecheck racecheck & pids="$pids $!"
watch synccheck synccheck & pids="$pids $!"
arguments=--teleport
watch memcheck-of-teleports memcheck & pids="$pids $!"
collect() { cat "$folder"/* >"$OUT/sanitizer.log"; rm -r "$folder"; }
trap "collect; exit 124" TERM
status=0
for pid in $pids; do wait "$pid" || status=1; done
grep -hE "^===|SUMMARY" "$folder"/*
collect
exit $status'

teleport='"$PYTHON" -m bench.teleport --device cuda --rounds 3 --out "$OUT/teleport.json"'
layer='"$PYTHON" -m bench.layer --device cuda --rounds 5 --out "$OUT/layer.json"'
roofline='"$PYTHON" -m bench.roofline --device cuda --out "$OUT/roofline.json"'
if [ -n "${MNIST_DIR:-}" ]; then
    training_arguments='--shape mnist-0.01 --data-dir "$MNIST_DIR" --seeds 1 2 3'
else
    training_arguments='--shape digits-0.05'
fi
training='"$PYTHON" -m bench.training --device cuda --processes 1 --out "$OUT/training.json" '$training_arguments

export OUT PYTHON
stage machine 30 bash -c "$machine"
stage build 240 bash -c "$build"
stage tests 180 bash -c "$tests"
stage sanitizer 110 bash -c "$sanitizer"
stage teleport 120 bash -c "$teleport"
stage layer 150 bash -c "$layer"
stage roofline 40 bash -c "$roofline"
stage training 60 bash -c "$training"

printf '\n=== summary, %d s\n' "$SECONDS"
"$PYTHON" -m bench.summary "$OUT" | tee -a "$log"
exit "$failed"
