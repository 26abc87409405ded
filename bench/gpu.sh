#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes and without a network: the build, the GPU tests, the
# benchmarks and compute-sanitizer, the most important first. Every stage has a share of the time that is left as its
# limit, so that the limits add up to less than the budget, and what one leaves goes to those behind it. A stage that
# fails stops none of the others, but a build that fails ends the script: all else would measure torch alone.
#
# Results go to the folder OUT: summary.json, gpu.log, tests.xml and a JSON file a benchmark, written as each stage
# ends, and by the benchmarks after every shape. Python needs torch, setuptools, ninja and pytest; nvcc must be there.
# The kernels are built into the checkout, from which all else runs. Nothing is installed outside of it.
#
# The headers of CUTLASS, where the package is not installed, come from a wheel in .whl/, fetched before:
#
#   pip download --no-deps nvidia-cutlass -d .whl
#
# All wheels there are unpacked into build/wheels, which Python then sees. git does not ignore .whl/, for a tool that
# copies the checkout to another machine may leave out what git ignores; it must never be committed.
#
#   OUT                   where to write, by default bench/results/gpu
#   STAGES                what to run, by default all: "machine build tests teleport layer roofline sanitizer training";
#                         what a former call built is still there, so "tests" alone runs with it
#   PYTHON                the interpreter, by default python3
#   BUDGET                seconds for all, by default 570
#   CUTLASS_HOME          the folder above CUTLASS's include, unless the package is installed or its wheel in .whl/
#   TORCH_CUDA_ARCH_LIST  what to build for, by default the first device's compute capability
#   MNIST_DIR             a folder of MNIST's IDX files for the training runs, by default scikit-learn's digits
#
# In two calls, each with its own OUT, every stage has about twice the time:
#
#   STAGES="machine build tests teleport" bench/gpu.sh
#   STAGES="machine layer roofline sanitizer training" bench/gpu.sh
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
# In their order. Each is the name of the variable below that holds its command, and has the weight of its share: about
# its seconds where all are run and each takes its limit.
order=(machine build tests teleport layer roofline sanitizer training)
declare -A weights=([machine]=20 [build]=100 [tests]=120 [teleport]=90 [layer]=100 [roofline]=30 [sanitizer]=60
    [training]=40)
read -ra chosen <<<"${STAGES:-${order[*]}}"
to_come=0  # the weights of the stages that have not begun
for name in "${chosen[@]}"; do
    if [ -z "${weights[$name]:-}" ]; then
        printf 'STAGES must be among %s, got %s\n' "${order[*]}" "$name" >&2
        exit 2
    fi
    to_come=$((to_come + weights[$name]))
done
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
log=$OUT/gpu.log
: >"$log"
wheels=$PWD/build/wheels
export PYTHONPATH=$wheels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export SYMTELE_KERNELS_REQUIRED=1  # a GPU test without a device or without the kernels fails, where it would be skipped

stages=()
failed=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# The first and the last of a file, so that the logs of all stages are less than 12 MB together.
shorten() {
    local half=700000
    if [ "$(wc -c <"$1")" -le $((2 * half)) ]; then
        cat "$1"
    else
        head -c "$half" "$1"
        printf '\n[... the middle is left out ...]\n'
        tail -c "$half" "$1"
    fi
}

# stage NAME COMMAND: runs the command in bash into the log, shows its last lines, notes its status and time, and
# returns its status. The command finds its limit in LIMIT.
stage() {
    local name=$1 limit status begun=$SECONDS
    case " ${chosen[*]} " in *" $name "*) ;; *) return 0 ;; esac
    rm -f "$OUT/$name".{json,xml}
    limit=$(((BUDGET - SECONDS) * weights[$name] / to_come))
    to_come=$((to_come - weights[$name]))
    printf '=== %s\n' "$name" | tee -a "$log"
    if [ "$limit" -lt 1 ]; then
        printf 'not started: the time is used up\n' | tee -a "$log"
        status=124
    else
        LIMIT=$limit timeout --kill-after=5 "$limit" bash -c "$2" >"$output" 2>&1
        status=$?
        shorten "$output" >>"$log"
        tail -n 6 "$output" | cut -c 1-240
    fi
    [ "$status" -eq 0 ] || failed=1
    stages+=("{\"name\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begun))}")
    local IFS=,
    printf '{"stages": [%s]}\n' "${stages[*]}" >"$OUT/summary.json"
    return "$status"
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

# Without an installation, which some systems forbid, and with no library left of a build before, should this one fail.
build='rm -rf symtele_cuda/_kernels.so symtele_cuda/_build.json "$wheels"
if compgen -G ".whl/*.whl"; then
    "$PYTHON" -m pip install --no-index --no-deps --target "$wheels" .whl/*.whl || exit 1
fi
"$PYTHON" setup.py build --build-lib build/gpu &&
cp build/gpu/symtele_cuda/_kernels.so build/gpu/symtele_cuda/_build.json symtele_cuda/ &&
"$PYTHON" -m symtele_cuda info && "$PYTHON" -c "from symtele_cuda.kernels import extension; extension.load()"'

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
    printf "%s %s\n" --- "$name" >"$folder/$name"
    env "$@" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m bench.sanitize $arguments 2>&1 |
        head -c 250000 >>"$folder/$name"
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
collect() { cat "$folder"/*; rm -r "$folder"; }
trap "collect; exit 124" TERM
status=0
for pid in $pids; do wait "$pid" || status=1; done
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

export OUT PYTHON wheels
for name in "${order[@]}"; do
    stage "$name" "${!name}" || [ "$name" != build ] || break
done
printf '\n=== summary, %d s\n' "$SECONDS"
"$PYTHON" -m bench.summary "$OUT" | tee -a "$log"
exit "$failed"
