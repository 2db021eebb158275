#!/usr/bin/env bash
# Tests, tiles, norms and training step on a GPU.   bash bench/gpu.sh OUTDIR [--quick]
#
# Ends inside 12 minutes (--quick: 3). Installs nothing. OUTDIR then holds log.txt (all output), summary.txt (how each
# part ended, tables), sweep.json, norms.json, train_step.json: whatever finished. Exit status 0 if every part ended
# well, 1 if one did not, 2 for wrong usage or no GPU. PYTHON names another interpreter.
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
if ! timeout 100 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh needs a CUDA GPU, and the torch of $python sees none (or there is no torch: name another with PYTHON=)" >&2
    exit 2
fi
log=$out/log.txt
rm -f "$out"/{sweep,norms,train_step}.json "$out/summary.txt" # of an earlier run
: > "$log"
all_well=0

# Seconds for all, and those that each part is promised; the rest is for starting up and for parts that end late. What
# tests and sweep leave goes to the norms, and what those leave to the training step.
if [ -n "$quick" ]; then total=165; tests=45; sweep=30; train=35; widths="--n 1024"
else total=720; tests=120; sweep=180; train=180; widths=; fi

# part NAME SECONDS MARGIN COMMAND...: run it with a time limit, log its output and its end. With a MARGIN the command is
# told to stop measuring that many seconds before the limit.
part() {
    local name=$1 limit=$2 margin=$3 left=$((total - SECONDS - 10)) begun=$SECONDS status
    shift 3
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    printf '\n' >> "$log"
    if [ "$limit" -lt $((margin + 5)) ]; then
        echo "== $name: not run, time is up" | tee -a "$log"; all_well=1; return 1
    fi
    [ "$margin" -eq 0 ] || set -- "$@" --minutes "$(awk "BEGIN { print ($limit - $margin) / 60 }")"
    echo "-- $name, at most $limit s: $*" | tee -a "$log"
    # An interrupt lets pytest and the benchmarks end in order; 10 seconds later they are killed.
    timeout -s INT -k 10 "$limit" "$@" >> "$log" 2>&1
    status=$?
    case $status in
        0) echo "== $name: ended well after $((SECONDS - begun)) s" ;;
        124) echo "== $name: TIME LIMIT of $limit s" ;;
        137) echo "== $name: KILLED after $((SECONDS - begun)) s, limit $limit s" ;;
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
# Most of their time is compiling: a process per core where pytest-xdist is installed.
jobs=
if "$python" -c 'import xdist' 2>> "$log"; then jobs="-n auto"; fi

# The tests demand deterministic algorithms; cuBLAS has them only with a fixed workspace.
# shellcheck disable=SC2086
part tests "$tests" 0 env CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=2 "$python" -m pytest -q -p no:cacheprovider \
    -o faulthandler_timeout=30 $jobs --device cuda $first $rest
# shellcheck disable=SC2086
part sweep "$sweep" 10 "$python" -m bench.sweep --output "$out" $widths
part norms $((total - SECONDS - 10 - train)) 15 "$python" -m bench.norms --output "$out" $quick
part train_step $((total - SECONDS - 10)) 15 "$python" -m bench.train_step --output "$out" $quick

{
    grep -E '^(== |FAILED|ERROR)|(passed|failed|errors?) in [0-9.]+s' "$log"
    for name in norms train_step; do
        [ ! -e "$out/$name.json" ] || { echo; "$python" -m bench.table "$out/$name.json"; }
    done
} 2>&1 | tee "$out/summary.txt"
exit $all_well
