#!/usr/bin/env bash
# The half hour on a card: tests, speed and memory, on a bare machine with torch and without a network.
#   bash tests/gpu/run.sh FOLDER [a] [b] [c]     from the repository's root; all parts if none is named
# a: the tests marked `gpu` (whole runs, a signal in the middle, samples and figures beside those of a CPU);
# b: updates of the published ADM network and of small ones, with and without CUDA graphs; c: 50,000 images of 1,000
# classes drawn, seen and compared. A part takes nine minutes at most; one that fails leaves its log and the others run.
# FOLDER/card.json is what `msd bench --show FOLDER/card.json` prints; give it back with the commit it was made at.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) && shift
parts=${*:-a b c}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=140
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/cache} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/inductor}

timed() { # SECONDS NAME COMMAND...: its output in FOLDER/NAME.json, what it says on the way in FOLDER/NAME.log
    local limit=$1 name=$2 begun=$SECONDS; shift 2
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log"
    local code=$?
    echo "$name: exit code $code after $((SECONDS - begun)) s"
    [ "$code" = 0 ] || { mv "$out/$name.json" "$out/$name.failed"; tail -n 15 "$out/$name.failed" "$out/$name.log"; }
}

for part in $parts; do
    case $part in
    a) timeout --signal=INT --kill-after=20 520 python3 -m pytest -v -m gpu -p no:cacheprovider -p no:benchmark --tb=short -n "${JOBS:-4}" \
        --durations=10 --junitxml="$out/tests.xml" tests | tee "$out/tests.log" ;;
    b) timed 240 bench-adm python3 -m msdcli bench imagenet64-msd4-dm stages.0.pairs=none compile=false \
        --batch 64 --repeats 3 --json
       timed 280 bench-small python3 -m msdcli bench tests/gpu/small.yaml compile=true --graphs --repeats 5 --json ;;
    c) timed 420 measuring python3 -m msdcli bench measuring imagenet64-msd4-small --images 50000 --json ;;
    *) echo "no part $part: a, b or c"; exit 2 ;;
    esac
done
python3 -m tests.gpu.collect "$out" && python3 -m msdcli bench --show "$out/card.json"
