#!/usr/bin/env bash
# A real run under SLURM on this machine by launch/slurm.sh, two tasks: near its time limit it is told to save, is
# requeued, and ends with the numbers of a run that nothing interrupted. `make test-system` runs it.
#
# usage: tests/system/slurm_run.sh [FOLDER]
#
# Needs root and Debian's slurm-wlm and munge, which it installs if apt-get is there. All daemons run with a
# configuration of their own under FOLDER (default: a new one, removed at the end) and are ended again.
# Environment: PYTHON (default: .venv/bin/python); STEPS, optimizer steps a task (default: 1500), enough for the run to
# last longer than the minute in which SLURM looks at time limits.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

fail() { printf 'slurm_run.sh: %s\n' "$1" >&2 && exit 1; }

[[ $(id -u) == 0 ]] || fail "must be root, to start munged, slurmctld and slurmd"
missing=()
for program in munged slurmctld slurmd sbatch srun scontrol; do
  command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || fail "missing: ${missing[*]} (Debian: slurm-wlm, munge)"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
fi
export PYTHON=${PYTHON:-$PWD/.venv/bin/python} JAX_PLATFORMS=cpu PYTHONPATH=$PWD
"$PYTHON" -c 'import jaxcl' || fail "$PYTHON cannot import jaxcl; name another interpreter by PYTHON"

folder=${1:-$(mktemp -d)}
mkdir -p "$folder"/{state,spool,munge}
chmod 755 "$folder"
chmod 700 "$folder/munge"
daemons=()
# shellcheck disable=SC2317 # called by the trap
end() {
  local status=$?
  trap - EXIT
  scancel --full "${job:-0}" 2>/dev/null || true
  for ((index = ${#daemons[@]} - 1; index >= 0; index--)); do kill "${daemons[index]}" 2>/dev/null || true; done
  wait
  ((status == 0)) || tail -n 30 "$folder"/*.log "$folder"/*.out >&2 || true
  [[ -n ${1:-} ]] || rm -rf -- "$folder"
  exit "$status"
}
# shellcheck disable=SC2064 # whether a folder was given is known now
trap "end '${1:+kept}'" EXIT

host=$(hostname -s)
cat >"$folder/slurm.conf" <<CONF
ClusterName=jaxcl-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5
ReturnToService=2
KillWait=10
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 600 "$folder/munge/key"
munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
  --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
  >"$folder/munged.log" 2>&1 &
daemons+=($!)
sleep 1
slurmctld -D >"$folder/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D >"$folder/slurmd.log" 2>&1 &
daemons+=($!)
for _ in {1..60}; do
  [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && break
  sleep 1
done
[[ $(sinfo --noheader --format=%T) == idle ]] || fail "the node did not become idle"

config=(tests/system/slurm.yaml "training.steps=${STEPS:-1500}")
echo "an uninterrupted run, by launch/local.sh"
launch/local.sh 2 run "${config[@]}" "output=$folder/reference"

echo "the same under SLURM"
# The longest possible notice of a limit that is far away; the limit is drawn near once the run is under way.
job=$(launch/slurm.sh --notice 120 --parsable --time=100 --nodes=1 --ntasks=2 --output="$folder/job.out" -- \
  run "${config[@]}" "output=$folder/slurm run")
field() { scontrol --oneliner show job "$job" | grep -oE "(^| )$1=[^ ]+" | head -n 1 | cut -d= -f2; }
wait_until() { # SECONDS WORDS COMMAND...
  local seconds=$1 words=$2
  shift 2
  for ((; seconds > 0; seconds--)); do
    "$@" && return
    case $(field JobState) in FAILED | TIMEOUT | CANCELLED | NODE_FAIL) fail "the job ended: $(field JobState)" ;; esac
    sleep 1
  done
  fail "did not come: $words"
}
trained() { [[ -s $folder/slurm\ run/metrics.jsonl ]]; }
restarted() { [[ $(field Restarts) -ge 1 ]]; }
completed() { [[ $(field JobState) == COMPLETED ]]; }
wait_until 1800 "a first row of metrics" trained
scontrol update "JobId=$job" TimeLimit="$(($(squeue --noheader --job="$job" --format=%M | awk -F: '{ print $(NF - 1) }') + 2))"
wait_until 300 "the requeue near the time limit" restarted
grep -q 'stopping after this step' "$folder/job.out" || fail "the program was not told to stop"
scontrol update "JobId=$job" TimeLimit=100
wait_until 1800 "the end of the job" completed

"$PYTHON" - "$folder/reference" "$folder/slurm run" <<'PY'
import json, pathlib, sys

def read(folder):
    folder = pathlib.Path(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {(row["step"], row["kind"]): row["loss"] for row in rows if row["steps"]}, results

(losses, reference), (others, results) = map(read, sys.argv[1:])
common = losses.keys() & others.keys()
assert results["finished"] and results["matrix"] == reference["matrix"], (results["matrix"], reference["matrix"])
last = max(losses)
assert last in common and losses[last] == others[last], (losses[last], others.get(last))
print(f"equal to the bit: scores {results['matrix']}, loss {losses[last]} at step {last[0]}")
PY
echo "restarts: $(field Restarts)"
