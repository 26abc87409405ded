#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes and without a network: the build, the GPU tests,
# compute-sanitizer and the benchmarks, each stage under its own time limit, the most important first. A stage that
# fails stops none of the others. Results go to the folder OUT: summary.json, gpu.log, sanitizer.log, tests.xml and a
# JSON file a benchmark. Python needs torch, setuptools, ninja and pytest; nvcc must be there. Nothing is installed:
# the kernels are built into the checkout, from which all else runs.
#
#   OUT                   where to write, by default bench/results/gpu
#   STAGES                what to run, by default "machine build tests teleport sanitizer layer roofline training"; what
#                         a former call built is still there, so "tests" alone runs with it
#   PYTHON                the interpreter, by default python3
#   BUDGET                seconds for all, by default 540; a stage that comes too late is not started
#   CUTLASS_HOME          the folder above CUTLASS's include, unless the package nvidia-cutlass is installed
#   TORCH_CUDA_ARCH_LIST  what to build for, by default the first device's compute capability
#   MNIST_DIR             a folder of MNIST's IDX files for the training runs, by default scikit-learn's digits
#
# In several calls, should one be too short:
#
#   STAGES="machine build tests" bench/gpu.sh; STAGES="teleport layer roofline" bench/gpu.sh
#   STAGES="sanitizer training" bench/gpu.sh
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
STAGES=${STAGES:-machine build tests teleport sanitizer layer roofline training}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-540}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
log=$OUT/gpu.log
: >"$log"
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

stages=()
failed=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# stage NAME SECONDS COMMAND: runs the command in bash into the log, shows its last lines, notes its status and time.
# It finds its limit in LIMIT.
stage() {
    local name=$1 limit=$2 begun=$SECONDS status
    case " $STAGES " in *" $name "*) ;; *) return ;; esac
    rm -f "$OUT/$name".{json,xml,log}
    [ "$limit" -le $((BUDGET - SECONDS)) ] || limit=$((BUDGET - SECONDS))
    printf '=== %s\n' "$name" | tee -a "$log"
    if [ "$limit" -lt 5 ]; then
        printf 'not started: the time is used up\n' | tee -a "$log"
        status=124
    else
        LIMIT=$limit timeout --kill-after=5 "$limit" bash -c "$3" >"$output" 2>&1
        status=$?
        head -c 12000000 "$output" >>"$log"
        tail -n 6 "$output" | cut -c 1-240
    fi
    [ "$status" -eq 0 ] || failed=1
    stages+=("{\"name\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begun))}")
    local IFS=,
    printf '{"stages": [%s]}\n' "${stages[*]}" >"$OUT/summary.json"
}

# The first two lines say all that the summary repeats.
machine='"$PYTHON" -c "
import torch
from bench.harness import machine_line
assert torch.cuda.is_available(), \"torch sees no CUDA device\"
properties = torch.cuda.get_device_properties(0)
print(machine_line(torch.device(\"cuda\"), torch.float32))
print(properties.multi_processor_count, \"multiprocessors,\", properties.total_memory >> 30, \"GiB,\",
      properties.L2_cache_size >> 20, \"MiB of L2, compute capability\", properties.major, properties.minor)
" && nvidia-smi && nvcc --version'

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    ask='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    TORCH_CUDA_ARCH_LIST=$(timeout 60 "$PYTHON" -c "$ask" 2>>"$log") || TORCH_CUDA_ARCH_LIST=9.0
fi
export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1

# Without pip, which some systems forbid to install, and with no library left of a build before, should this one fail.
build='rm -f symtele_cuda/_kernels.so symtele_cuda/_build.json
"$PYTHON" setup.py build --build-lib build/gpu &&
cp build/gpu/symtele_cuda/_kernels.so build/gpu/symtele_cuda/_build.json symtele_cuda/ &&
"$PYTHON" -m symtele_cuda info && "$PYTHON" -c "from symtele_cuda import extension; extension.load()"'

# A process for each test function, several side by side: what breaks a process's context, as a bad address does,
# breaks no other's tests. Those that use up memory come last, alone. Before the limit pytest is interrupted, so that it
# reports what it has.
tests='
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), \"torch sees no CUDA device\"" || exit 1
export folder=$(mktemp -d) end=$(($(date +%s) + LIMIT - 15))
one() {
    left=$((end - $(date +%s))) name=$folder/$(echo "$1" | tr -c "a-z0-9_\n" .) status=124
    [ "$left" -le 90 ] || left=90
    if [ "$left" -ge 5 ]; then
        timeout --foreground --signal=INT --kill-after=8 "$left" env --default-signal=INT "$PYTHON" -m pytest -m gpu \
            "$1" -q --tb=short --maxfail=25 -p no:cacheprovider --junitxml="$name.xml" 2>&1 |
            head -c 150000 >"$name.log"
        status=${PIPESTATUS[0]}
    fi
    [ "$status" -le 1 ] || echo "ended early, with status $status: $1" >>"$name.log"
    return "$status"
}
export -f one
collect() {
    cat "$folder"/*.log
    {
        echo "<testsuites>"
        for xml in "$folder"/*.xml; do
            sed -E "s/<\?xml[^>]*>//g; s/<\/?testsuites[^>]*>//g; s/ hostname=\"[^\"]*\"//g" "$xml"
        done
        grep -h "^ended early" "$folder"/*.log |
            sed -E "s|(.*): tests/(.*)\.py::(.*)|<testsuite tests=\"1\" errors=\"1\">\
            <testcase classname=\"tests.\2\" name=\"\3\"><error message=\"\1\"/></testcase></testsuite>|"
        echo "</testsuites>"
    } >"$OUT/tests.xml"
    rm -r "$folder"
}
trap "collect; exit 124" TERM
all=$(grep -oE "^def test_\w+" tests/test_gpu_{products,teleport,layer,errors}.py | sed "s/:def /::/")
status=0
grep -v out_of_memory <<<"$all" | xargs -P "$((($(nproc) + 1) / 2))" -I{} bash -c "one {}" || status=1
grep out_of_memory <<<"$all" | xargs -I{} bash -c "one {}" || status=1
collect
exit $status'

# Memory straight from the driver for memcheck and initcheck: torch's own allocator hands out blocks larger than asked
# for and used before, in which an access past the end, or to what nobody wrote, cannot be seen. Graphs need torch's.
sanitizer='
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), \"torch sees no CUDA device\"" || exit 1
watch() {
    name=$1 tool=$2
    shift 2
    printf "=== %s\n" "$name" >"$folder/$name"
    env "$@" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m bench.sanitize $arguments 2>&1 |
        head -c 2000000 >>"$folder/$name"
    return "${PIPESTATUS[0]}"
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
stage machine 40 "$machine"
stage build 200 "$build"
stage tests 180 "$tests"
stage teleport 110 "$teleport"
stage sanitizer 110 "$sanitizer"
stage layer 150 "$layer"
stage roofline 40 "$roofline"
stage training 80 "$training"

printf '\n=== summary, %d s\n' "$SECONDS"
"$PYTHON" -m bench.summary "$OUT" | tee -a "$log"
exit "$failed"
