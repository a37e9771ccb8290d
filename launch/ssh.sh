#!/usr/bin/env bash
# Runs a jaxcl command on a list of hosts over ssh, one process a host.
#
# usage: launch/ssh.sh --hosts A,B,... [--directory DIR] [--port P] [--name NAME] [--restarts R] [--stop]
#          [--dry-run] COMMAND [ARGUMENT...]
#   e.g. launch/ssh.sh --hosts gpu1,gpu2 --directory /shared/jaxcl run configs/quickstart_das.yaml output=runs/two
#
#   COMMAND ...      the jaxcl command line without `jaxcl`
#   --hosts A,B,...  where to run, as ssh knows them; the others must reach the first by that name
#   --directory DIR  where to run on each host (default: this folder's path)
#   --port P         port of process 0 on the first host (default: 8476)
#   --name NAME      of the log and pid files DIR/.launch/NAME.I.log and .pid on each host (default: run)
#   --restarts R     how often all are started again when a process dies (default: 0); they go on from the last checkpoint
#   --stop           tell the run of that NAME to save and end, without a COMMAND
#   --dry-run        print what would be run, one line a host, and run nothing
#   --help           this text
#
# Environment: PYTHON, the interpreter on the hosts (default: python3), found from DIR; SSH, the program (default:
# ssh -o BatchMode=yes); JAXCL_TOKEN, by which the processes know each other (default: random; it goes over ssh). The run folder must lie on storage that all hosts share.
# What process 0 writes comes as it is, lines of process I with [I] before them. Ctrl-C, SIGTERM and SIGUSR1 go to all
# programs: they save after the step at hand and end with 130; the same command goes on. Programs outlive this script
# if it is killed; see --stop.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

hosts="" directory=$PWD port=8476 name=run restarts=0 stop=0 dry_run=0
while (($#)); do
  case $1 in
    --help) print_help "$0" && exit 0 ;;
    --hosts) needs_value "$1" $# && hosts=$2 && shift 2 ;;
    --directory) needs_value "$1" $# && directory=$2 && shift 2 ;;
    --port) needs_value "$1" $# && port=$2 && shift 2 ;;
    --name) needs_value "$1" $# && name=$2 && shift 2 ;;
    --restarts) needs_value "$1" $# && restarts=$2 && shift 2 ;;
    --stop) stop=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -*) usage_error "unknown option $1" ;;
    *) break ;;
  esac
done
[[ -n $hosts ]] || usage_error "--hosts is missing"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || usage_error "--name: letters, digits, '.', '_' and '-' only, got '$name'"
positive --port "$port"
whole_number --restarts "$restarts"
((stop)) || (($#)) || usage_error "expected a command"
IFS=, read -r -a names <<<"$hosts"
for host in "${names[@]}"; do
  [[ -n $host && $host != -* ]] || usage_error "--hosts: '$host' is no host"
done
read -r -a connect <<<"${SSH:-ssh -o BatchMode=yes}"
arguments=("$@")
address=${names[0]#*@} # ssh's user is not part of it

# Sets `command` to the whole command for host $1.
command_of() {
  command=("${connect[@]}" "${names[$1]}" "$(
    remote_line "$remote_start" "$directory" "$name.$1" - env "JAX_COORDINATOR_ADDRESS=$address:$port" \
      "JAX_NUM_PROCESSES=${#names[@]}" "JAX_PROCESS_ID=$1" "${PYTHON:-python3}" -m jaxcl "${arguments[@]}"
  )")
}

stop_member() {
  "${connect[@]}" "${names[$1]}" "$(remote_line "$remote_signal" "$directory" "$name.$1" "$2")" || true
}

if ((stop)); then
  for index in "${!names[@]}"; do
    if ((dry_run)); then
      quoted "${connect[@]}" "${names[index]}" "$(remote_line "$remote_signal" "$directory" "$name.$index" TERM)" && echo
    else
      stop_member "$index" TERM
    fi
  done
  exit 0
fi
if ((dry_run)); then
  for index in "${!names[@]}"; do
    command_of "$index"
    quoted "${command[@]}" && echo
  done
  exit 0
fi
start_members() {
  local index
  for index in "${!names[@]}"; do
    command_of "$index"
    if ((index == 0)); then
      "${command[@]}" <<<"$JAXCL_TOKEN" &
    else
      "${command[@]}" <<<"$JAXCL_TOKEN" > >(sed -u "s/^/[$index] /") 2> >(sed -u "s/^/[$index] /" >&2) &
    fi
    members[index]=$!
  done
}

share_token
pass_on_signals
run_members "$restarts"
