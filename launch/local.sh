#!/usr/bin/env bash
# Runs a jaxcl command as N processes on this machine, on CPU.
#
# usage: launch/local.sh [--devices D] [--port P] [--restarts R] [--dry-run] N COMMAND [ARGUMENT...]
#   e.g. launch/local.sh 2 run configs/quickstart_seekr.yaml output=runs/two
#
#   N             number of processes
#   COMMAND ...   the jaxcl command line without `jaxcl`
#   --devices D   devices over all processes, a multiple of N (default: N); a CPU counts as several
#   --port P      port of process 0 on 127.0.0.1 (default: a free one)
#   --restarts R  how often all are started again when a process dies (default: 0); they go on from the last checkpoint
#   --dry-run     print what would be run, one line a process, and run nothing
#   --help        this text
#
# Environment: PYTHON, the interpreter (default: python3); JAX_PLATFORMS (default: cpu).
# What process 0 writes comes as it is, lines of process I with [I] before them. Ctrl-C, SIGTERM and SIGUSR1 go to all:
# they save after the step at hand and end with 130; the same command goes on. A second signal kills them.
# The first process that fails decides the exit code; the others are ended 10 seconds later. A process that dies is one
# that neither says an error (exit codes 1 and 2) nor was interrupted.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

devices="" port="" restarts=0 dry_run=0
while (($#)); do
  case $1 in
    --help) print_help "$0" && exit 0 ;;
    --devices) needs_value "$1" $# && devices=$2 && shift 2 ;;
    --port) needs_value "$1" $# && port=$2 && shift 2 ;;
    --restarts) needs_value "$1" $# && restarts=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    -*) usage_error "unknown option $1" ;;
    *) break ;;
  esac
done
(($# >= 2)) || usage_error "expected the number of processes and a command"
count=$1 && shift
positive N "$count"
devices=${devices:-$count}
positive --devices "$devices"
whole_number --restarts "$restarts"
((devices % count == 0)) || usage_error "--devices: $devices is no multiple of $count processes"

free_port() {
  local try
  for _ in {1..50}; do
    try=$((20000 + RANDOM % 12000)) # below the ports that systems give out by themselves
    (: <"/dev/tcp/127.0.0.1/$try") 2>/dev/null || { echo "$try" && return; }
  done
  usage_error "no free port found; name one with --port"
}
if [[ -z $port ]]; then port=$(free_port); fi
positive --port "$port"

# Sets `command` to the whole command of process $1.
command_of() {
  local flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$((devices / count))"
  command=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "XLA_FLAGS=$flags" "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1" "${PYTHON:-python3}" -m jaxcl "${arguments[@]}")
}

stop_member() { kill "-$2" "${members[$1]}" 2>/dev/null || true; }

arguments=("$@")
if ((dry_run)); then
  for ((index = 0; index < count; index++)); do
    command_of "$index"
    quoted "${command[@]}" && echo
  done
  exit 0
fi
start_members() {
  local index
  for ((index = 0; index < count; index++)); do
    command_of "$index"
    if ((index == 0)); then
      "${command[@]}" &
    else
      "${command[@]}" > >(sed -u "s/^/[$index] /") 2> >(sed -u "s/^/[$index] /" >&2) &
    fi
    members[index]=$!
  done
}

share_token
pass_on_signals
run_members "$restarts"
