#!/usr/bin/env bash
# The first half hour on a GPU, in three parts of at most nine minutes:
#
#     DATA=cifar10.npz OUT=results CACHE=.gpu bash tests/benchmarks/gpu.sh 1|2|3 [--device cpu --tiny]
#
# 1: CUDA tests, rates against the device's ceiling, one epoch on 2,000 images of each training.
# 2: standard model, robust model, D_rand, D_det and their controls.
# 3: D_R and D_NR, trainings on all datasets, measurement, report.
# Models and datasets stay in CACHE, and a part that was cut short resumes when it is run again; what
# is small and worth keeping is copied to OUT as it is made. --tiny runs it all on a few images.
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?part: 1, 2 or 3}
shift
device=cuda tiny=
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 && shift 2 ;;
    --tiny) tiny=yes && shift ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
    esac
done
: "${DATA:?an .npz with x_train, y_train, x_test, y_test, or cifar-10-batches-py}"
: "${OUT:=results}" "${CACHE:=.gpu}"
mkdir -p "$OUT" "$CACHE"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}

study=("$python" examples/cifar10.py --data "$DATA" --budget gpu --device "$device" --seed 0)
bench=("$python" tests/benchmarks/bench_roofline.py --device "$device")
if [ -n "$tiny" ]; then
    study=("$python" examples/cifar10.py --data "$DATA" --budget cpu --device "$device" --seed 0
        --samples 10 --epochs 1 --precision float32)
    bench+=(--networks small --batch 2 --rounds 0 --steps 1 --size 64)
elif [ "$device" != cpu ]; then
    bench+=(--networks fast resnet18 --batch 1024 --size 8192)
fi

# Each command by its name, with a limit in seconds; its output to a file as well as to the screen.
step() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" || echo "$name: status $?" | tee -a "$OUT/failed.txt"
}

keep() { # what is small of a study's folder
    mkdir -p "$OUT/stages"
    cp -f "$CACHE"/study/stages/*.json "$OUT/stages/" 2>/dev/null || true
    cp -f "$CACHE/study/report.html" "$OUT/" 2>/dev/null || true
}

# Stages of the study: a process and a limit for each, or one for all where everything is tiny.
stages() { # limit, names
    local limit=$1
    shift
    if [ -n "$tiny" ]; then
        step "${1// /-}" "$limit" "${study[@]}" --out "$CACHE/study" --stages "$@"
        keep
        return
    fi
    for name in "$@"; do
        step "${name// /-}" "$limit" "${study[@]}" --out "$CACHE/study" --stages "$name"
        keep
    done
}

case $part in
1)
    step cuda-tests 200 "$python" -m pytest -q -p no:cacheprovider -m cuda tests/test_cuda.py
    step rates 150 "${bench[@]}"
    [ -n "$tiny" ] || step rates-compiled 120 "${bench[@]}" --compile --precisions bfloat16
    first=("${study[@]}" --out "$CACHE/first")
    if [ -n "$tiny" ]; then # the other parts run the stages too
        first+=(--stages "train standard")
    else
        first+=(--samples 2000 --epochs 1 --stages "measure D_det")
    fi
    step first-study 180 "${first[@]}"
    ;;
2)
    stages 300 "train standard" "train robust" "make D_det" "make D_det control" "make D_rand" \
        "make D_rand control"
    ;;
3)
    stages 240 "make D_R" "make D_NR"
    all=("${study[@]}" --out "$CACHE/study" --pgd)
    [ -z "$tiny" ] || all+=(--stages "measure D_R")
    step study 500 "${all[@]}"
    keep
    ;;
*) echo "part $part: 1, 2 or 3" >&2 && exit 2 ;;
esac
[ ! -e "$OUT/failed.txt" ] || { cat "$OUT/failed.txt" && exit 1; }
