#!/usr/bin/env bash
# Everything worth measuring on a GPU, in one call: tests, loss, training step, CIFAR-10 against the clock.
#
#   benchmarks/gpu.sh [--dry-run] [--out DIR] [--minutes N] [--train FILE --test FILE] [--commit ID] [--wheels DIR] [part …]
#
# Parts: tests loss step-resnet18 step-resnet50 cifar; all of them unless some are named. A part that is done leaves
# DIR/PART.done, and a later call with the same DIR skips it; the CIFAR-10 training goes on where it was stopped. A part
# that fails does not keep the others from running; the exit code is then 1. The table comes last, DIR/gpu.json has it too.
#
#   --train, --test   CIFAR-10 as .beton files (default: prepared from $SIMCLR_DATA/cifar10-jpeg.tar.xz into DIR)
#   --commit          what the results are filed under where there is no git
#   --wheels          install these wheels (ffcv, lightly, …) into DIR/site, without a network
#   --dry-run         the same way on the CPU at toy sizes: does the script work? Its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; }

dry_run=0 out=gpu_results minutes=9.5 train="" test="" commit="" wheels="" parts=()
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --out | --minutes | --train | --test | --commit | --wheels)
            (($# > 1)) || { echo "$1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift ;;
        -h | --help) usage; exit 0 ;;
        tests | loss | step-resnet18 | step-resnet50 | cifar) parts+=("$1") ;;
        *) echo "unknown argument: $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests loss step-resnet18 step-resnet50 cifar)
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "--minutes: expected a number, found $minutes" >&2; exit 2; }

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$out/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n $wheels && ! -d $out/site ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
fi
if ((dry_run)); then
    export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=""
elif ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "no CUDA device; --dry-run tries the script out on the CPU" >&2
    exit 2
fi
deadline=$((SECONDS + $(awk -v m="$minutes" 'BEGIN { print int(60 * m) }')))
states=() failed=0

# run_part NAME SECONDS COMMAND…: exit code 3 means that there is more to do in a later call.
run_part() {
    local name=$1 budget=$2 left rc=0
    shift 2
    if [[ -e $out/$name.done ]]; then
        states+=("$name=done before")
        return
    fi
    left=$((deadline - SECONDS))
    if ((left < 5)); then
        states+=("$name=no time left")
        return
    fi
    echo "== $name"
    timeout --kill-after=20 $((budget < left ? budget : left)) "$@" >"$out/$name.log" 2>&1 || rc=$?
    tail -n 12 "$out/$name.log"
    case $rc in
        0) touch "$out/$name.done"; states+=("$name=done") ;;
        3) states+=("$name=call again") ;;
        124 | 137) states+=("$name=out of time"); failed=1 ;;
        *) states+=("$name=FAILED ($rc)"); failed=1 ;;
    esac
}

part_tests() {
    local files=(tests)
    ((dry_run)) && files=(tests/test_gpu_loss.py)
    run_part tests 240 "$python" -m pytest -m gpu -p no:cacheprovider "${files[@]}"
}

part_loss() {
    local sizes=(--device cuda --dtype bfloat16 --rows 1024 8192 65536)
    ((dry_run)) && sizes=(--rows 128 --repetitions 1)
    run_part loss 120 "$python" -m benchmarks.loss --ranks --out "$out" "${sizes[@]}"
}

part_step-resnet18() {
    local sizes=(--device cuda --data "${train:-synthetic}")
    ((dry_run)) && sizes=(--device cpu --encoder resnet_small --batch-size 16 --precision fp32 --repetitions 2)
    run_part step-resnet18 90 "$python" -m benchmarks.step "${sizes[@]}" --out "$out/step-resnet18.json"
}

part_step-resnet50() {
    local sizes=(--device cuda --encoder resnet50 --image-size 224 --batch-size 256)
    ((dry_run)) && sizes=(--device cpu --encoder resnet_small --image-size 48 --batch-size 8 --precision fp32 --repetitions 2)
    run_part step-resnet50 120 "$python" -m benchmarks.step --stem imagenet "${sizes[@]}" --out "$out/step-resnet50.json"
}

part_cifar() {
    local left=$((deadline - SECONDS)) small=()
    local minutes_left
    # A minute for saving, or for the probe after the last epoch.
    minutes_left=$(awk -v s="$left" 'BEGIN { print (s > 90 ? (s - 60) / 60 : s / 120) }')
    if ((dry_run)); then
        small=(model.encoder=resnet_small model.width=8 train.epochs=1 optim.warmup_epochs=0.0 train.precision=fp32
            train.global_batch_size=128 evaluation.knn_every_epochs=1 evaluation.knn_k=20 monitor.log_every_steps=1)
    fi
    run_part cifar "$left" "$python" -m benchmarks.cifar10_clock --train "${train:-synthetic}" --test "${test:-synthetic}" \
        --runs "$out/runs" --minutes "$minutes_left" --out "$out/cifar.json" "${small[@]}"
}

# The images are prepared once, before the parts that need them.
if ((!dry_run)) && [[ -z $train && " ${parts[*]} " == *" cifar "* ]]; then
    archive=${SIMCLR_DATA:-data}/cifar10-jpeg.tar.xz
    [[ -e $archive ]] || { echo "no CIFAR-10: give --train and --test, or set SIMCLR_DATA (tried $archive)" >&2; exit 2; }
    for split in train test; do
        [[ -e $out/cifar10_$split.beton ]] ||
            "$python" -m simclr_dist.cli prepare "$archive" "$out/cifar10_$split.beton" --split "$split"
    done
    train=$out/cifar10_train.beton test=$out/cifar10_test.beton
fi

for part in "${parts[@]}"; do
    "part_$part"
done
"$python" -m benchmarks.gpu_report "$out" "$commit" "${states[@]}"
exit "$failed"
