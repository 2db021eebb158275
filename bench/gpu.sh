#!/usr/bin/env bash
# Tests, memory, benchmark and training step on a GPU.   bash bench/gpu.sh OUTDIR [--quick]
#
# Ends inside 9 minutes (--quick: 3). Installs nothing. OUTDIR then holds log.txt (all output), summary.txt, norms.json,
# norms.png, memory.json, train_step.json: whatever finished. Exit status 0 if every part ended well, 1 if one did not,
# 2 for wrong usage. PYTHON names another interpreter.
set -u

usage() { echo "usage: bash bench/gpu.sh OUTDIR [--quick]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
case $1 in -*) usage ;; esac
quick=${2:-}
[ -z "$quick" ] || [ "$quick" = --quick ] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
log=$out/log.txt
: > "$log"
all_well=0

# Seconds for all, and at most for each part. The rest is for starting up and for parts that end late.
if [ -n "$quick" ]; then total=165; tests=65; memory=20; norms=75; train=40
else total=520; tests=200; memory=60; norms=190; train=150; fi

# part NAME SECONDS COMMAND...: run it with a time limit, log its output and its end.
part() {
    local name=$1 limit=$2 left=$((total - SECONDS - 10)) begun=$SECONDS status
    shift 2
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    printf '\n' >> "$log"
    if [ "$limit" -lt 5 ]; then
        echo "== $name: not run, time is up" | tee -a "$log"; all_well=1; return
    fi
    echo "-- $name, at most $limit s: $*" | tee -a "$log"
    # An interrupt lets pytest and the benchmarks end in order; 10 seconds later they are killed.
    timeout -s INT -k 10 "$limit" "$@" >> "$log" 2>&1
    status=$?
    case $status in
        0) echo "== $name: ended well after $((SECONDS - begun)) s" ;;
        124 | 137) echo "== $name: TIME LIMIT of $limit s" ;;
        *) echo "== $name: STATUS $status after $((SECONDS - begun)) s" ;;
    esac | tee -a "$log"
    [ "$status" -eq 0 ] || all_well=1
}

# The kernels' own tests first, in case the limit cuts the rest.
first="tests/test_kernels.py tests/test_noise.py tests/test_ops.py"
rest=
for file in $(grep -lw device tests/test_*.py); do # what never asks for the device learns nothing from a GPU
    case " $first " in *" $file "*) ;; *) rest="$rest $file" ;; esac
done
[ -z "$quick" ] || rest=
minutes() { awk "BEGIN { print $1 / 60 }"; }

# The tests demand deterministic algorithms; cuBLAS has them only with a fixed workspace.
# shellcheck disable=SC2086
part tests "$tests" env CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest -q -p no:cacheprovider --device cuda $first $rest
part memory "$memory" "$python" -m bench.memory --output "$out" $quick
part norms "$norms" "$python" -m bench.norms --output "$out" --minutes "$(minutes $((norms - 25)))" $quick
part train_step "$train" "$python" -m bench.train_step --output "$out" --minutes "$(minutes $((train - 30)))" $quick

echo
"$python" -m bench.summary "$out" 2>&1 | tee "$out/summary.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || all_well=1
exit $all_well
