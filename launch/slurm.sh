#!/usr/bin/env bash
# Submits a jaxcl command to SLURM: one process a task, over one or many nodes; near its time limit the job saves, is
# requeued and goes on.
#
# usage: launch/slurm.sh [--notice S] [--dry-run] [SBATCH-OPTION...] -- COMMAND [ARGUMENT...]
#   e.g. launch/slurm.sh --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 --
#          run configs/seekr_llama2_7b_trace.yaml output=/shared/runs/trace
#
#   SBATCH-OPTION  goes to sbatch as it is; write --name=value in one word. One task a GPU: --ntasks-per-node equal to
#                  --gpus-per-node (jax gives task i of a node GPU i; leave out --gpus-per-task, which hides the others)
#   COMMAND ...    the jaxcl command line without `jaxcl`
#   --notice S     seconds before the time limit at which the run is told to save (default: 300); SLURM may tell it up
#                  to a minute earlier
#   --dry-run      print what would be submitted and what the job would then run, and submit nothing
#   --help         this text
#
# Environment: PYTHON, the interpreter (default: python3), the same on all nodes; sbatch hands the environment on.
# The run folder must lie on storage that all nodes share. Output goes to slurm-JOBID.out, appended to after a requeue.
# The job is requeued when its time limit comes near, when it is preempted, and when a node fails; not when the program
# fails, and not after `scancel JOBID`, upon which it saves and ends. When one task ends, the others get a minute.
set -euo pipefail

if [[ ${1:-} == --in-job ]]; then # sbatch runs a copy of this file: the second word says where it was
  source_folder=$2
else
  source_folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
fi
# shellcheck source=launch/common.sh
source "$source_folder/common.sh"

# Sets `step` to what the job runs.
step_of() {
  step=(srun --kill-on-bad-exit=0 --wait=60 "${PYTHON:-python3}" -m jaxcl "$@")
}

# Whether the job was neither cancelled nor ended by SLURM.
still_wanted() {
  [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]
}

run_in_job() {
  local near_limit=0 status=0 pid
  trap 'near_limit=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # reaches all tasks, not this shell
  trap ':' TERM                                                  # the tasks get it as well: wait until they have saved
  step_of "$@"
  "${step[@]}" &
  pid=$!
  while
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null
  do :; done # a signal ends `wait`, not the program
  if ((status != 0 && (near_limit || status == 130))) && still_wanted; then
    echo 'slurm.sh: saved; requeued to go on'
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # SLURM ends this script; to end by itself would end the job
  fi
  exit "$status"
}

if [[ ${1:-} == --in-job ]]; then
  shift 2
  run_in_job "$@"
fi

notice=300 dry_run=0 options=()
while (($#)); do
  case $1 in
    --help) print_help "$0" && exit 0 ;;
    --notice) needs_value "$1" $# && notice=$2 && shift 2 ;;
    --notice=*) notice=${1#*=} && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) break ;;
    *) options+=("$1") && shift ;;
  esac
done
[[ ${1:-} == -- ]] || usage_error "expected -- and a command"
shift
(($#)) || usage_error "expected a command after --"
positive --notice "$notice"

submit=(sbatch --requeue --open-mode=append --job-name=jaxcl "--signal=B:USR1@$notice" "${options[@]}"
  "$source_folder/slurm.sh" --in-job "$source_folder" "$@")
if ((dry_run)); then
  step_of "$@"
  quoted "${submit[@]}" && echo
  echo '# in the job, on every requeue again:'
  quoted "${step[@]}" && echo
  exit 0
fi
share_token # sbatch hands the environment on
exec "${submit[@]}"
