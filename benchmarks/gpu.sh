#!/usr/bin/env bash
# Everything worth measuring on a GPU, in one call: tests, loss, training step, CIFAR-10 against the clock.
#
#   benchmarks/gpu.sh [--dry-run] [--out DIR] [--work DIR] [--minutes N] [--train FILE --test FILE] [--pictures FILE]
#                     [--commit ID] [--wheels DIR] [part …]
#
# Parts: tests loss step-resnet18 step-resnet50 step-vit-s16 cifar; all of them unless some are named. It looks first
# whether all that it imports is there, and says how to bring what is not. The results are three files in --out: gpu.txt
# (the table), gpu.json, and logs.txt. All else is in --work, also what is done: a later call with the same --work skips
# it, and the CIFAR-10 training goes on where it was stopped. A part that fails does not keep the others from running;
# the exit code is then 1.
#
#   --out, --work     gpu_results and gpu_work, which git ignores
#   --train, --test   CIFAR-10 as .beton files (default: prepared from $SIMCLR_DATA/cifar10-jpeg.tar.xz into --work)
#   --pictures        Imagenette or the like as a .beton file, for step-vit-s16 (default: computed pictures of that size)
#   --commit          what the results are filed under where there is no git
#   --wheels          install these wheels (ffcv, lightly, …) into --work, without a network
#   --dry-run         the same way on the CPU at toy sizes: does the script work? Its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,21s/^# \{0,1\}//p' "$0"; }

all=(tests loss step-resnet18 step-resnet50 step-vit-s16 cifar)
dry_run=0 out=gpu_results work=gpu_work minutes=9.5 train="" test="" pictures="" commit="" wheels="" parts=()
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --out | --work | --minutes | --train | --test | --pictures | --commit | --wheels)
            (($# > 1)) || { echo "$1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift ;;
        -h | --help) usage; exit 0 ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || { echo "unknown argument: $1" >&2; usage >&2; exit 2; }
            parts+=("$1") ;;
    esac
    shift
done
((${#parts[@]})) || parts=("${all[@]}")
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "--minutes: expected a number, found $minutes" >&2; exit 2; }

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd) work=$(cd "$work" && pwd)
export PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n $wheels && ! -d $work/site ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$wheels"/*.whl
fi
"$python" benchmarks/gpu_imports.py "${parts[@]}" || exit 2
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
    local name=$1 budget=$(($2 * (1 + 3 * dry_run))) left rc=0  # a CPU that tries the script may be busy
    shift 2
    if [[ -e $work/$name.done ]]; then
        states+=("$name=done before")
        return
    fi
    left=$((deadline - SECONDS))
    if ((left < 5)); then
        states+=("$name=no time left")
        return
    fi
    echo "== $name"
    timeout --kill-after=20 $((budget < left ? budget : left)) "$@" >"$work/$name.log" 2>&1 || rc=$?
    tail -n 12 "$work/$name.log"
    case $rc in
        0) touch "$work/$name.done"; states+=("$name=done") ;;
        3) states+=("$name=call again") ;;
        124 | 137) states+=("$name=out of time"); failed=1 ;;
        *) states+=("$name=FAILED ($rc)"); failed=1 ;;
    esac
}

part_tests() {
    local files side_by_side=()
    mapfile -t files < <(grep -lE 'tests\.devices|mark\.gpu' tests/test_*.py)
    ((dry_run)) && files=(tests/test_gpu_loss.py)
    # Compiling kernels is the host's work, most of the time.
    ! "$python" -c "import xdist" 2>/dev/null || side_by_side=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
    run_part tests 240 "$python" -m pytest -m gpu -p no:cacheprovider -p no:benchmark "${side_by_side[@]}" "${files[@]}"
}

part_loss() {
    local sizes=(--device cuda --dtype bfloat16 --rows 1024 8192 16384 65536)
    ((dry_run)) && sizes=(--rows 128 --repetitions 1)
    run_part loss 120 "$python" -m benchmarks.loss --ranks --out "$work" "${sizes[@]}"
}

# step NAME IMAGES: IMAGES is a .beton file, or empty for images that need no decoding.
step() {
    local sizes=(--device cuda --data "${2:-synthetic}")
    if ((dry_run)); then
        sizes=(--device cpu --encoder resnet_small --image-size 32 --batch-size 8 --precision fp32 --windows 1 --window 2)
        [[ -z $2 ]] || sizes+=(--data "$2")
    fi
    run_part "$1" 110 "$python" -m benchmarks.step --row "$1" "${sizes[@]}" --out "$work/$1.json"
}

part_step-resnet18() { step step-resnet18 "$train"; }

part_step-resnet50() { step step-resnet50 ""; }

part_step-vit-s16() {
    local images=1024 size=()
    if ((dry_run)); then images=40 size=(--width 80 --height 60); fi
    if [[ -z $pictures && ! -e $work/step-vit-s16.done ]]; then
        pictures=$work/computed_pictures.beton
        echo "no --pictures: $images computed ones of the size of Imagenette's"
        [[ -e $pictures ]] || { "$python" -m benchmarks.pictures "$work/pictures" --images "$images" "${size[@]}" &&
            "$python" -m simclr_dist.cli prepare "$work/pictures" "$pictures" >"$work/pictures.log" 2>&1; } ||
            { states+=("step-vit-s16=FAILED (pictures)"); failed=1; return; }
    fi
    step step-vit-s16 "$pictures"
}

part_cifar() {
    local left=$((deadline - SECONDS)) small=()
    local minutes_left
    # A minute for saving, or for the probe after the last epoch.
    minutes_left=$(awk -v s="$left" 'BEGIN { print (s > 90 ? (s - 60) / 60 : s / 120) }')
    if ((dry_run)); then
        small=(model.encoder=resnet_small model.width=8 train.epochs=1 optim.warmup_epochs=0.0 train.precision=fp32
            train.global_batch_size=128 evaluation.knn_every_epochs=1 evaluation.knn_k=20 monitor.log_every_steps=1)
    elif [[ -z $train ]]; then
        states+=("cifar=no images")
        return
    fi
    run_part cifar "$left" "$python" -m benchmarks.cifar10_clock --train "${train:-synthetic}" --test "${test:-synthetic}" \
        --runs "$work/runs" --minutes "$minutes_left" --out "$work/cifar.json" "${small[@]}"
}

# The images are prepared once, before the parts that need them.
if ((!dry_run)) && [[ -z $train && " ${parts[*]} " == *" "@(cifar|step-resnet18)" "* ]]; then
    archive=${SIMCLR_DATA:-data}/cifar10-jpeg.tar.xz
    if [[ -e $archive ]]; then
        for split in train test; do
            [[ -e $work/cifar10_$split.beton ]] ||
                "$python" -m simclr_dist.cli prepare "$archive" "$work/cifar10_$split.beton" --split "$split"
        done
        train=$work/cifar10_train.beton test=$work/cifar10_test.beton
    else
        echo "no CIFAR-10: cifar is left out, and step-resnet18 has images that need no decoding. Give --train and --test," \
            "or set SIMCLR_DATA (tried $archive)" >&2
    fi
fi

for part in "${parts[@]}"; do
    "part_$part"
done
"$python" -m benchmarks.gpu_report "$work" "$out" "$commit" "${states[@]}"
exit "$failed"
