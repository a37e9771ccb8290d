#!/usr/bin/env bash
# Runs a jaxcl command on all workers of a Cloud TPU VM pod, by gcloud: asks for the pod, copies this folder to it,
# installs, runs, brings the logs back.
#
# usage: launch/tpu_vm.sh --project P --zone Z --name NAME [--type T --version V [--spot]] [--bucket B]
#          [--directory DIR] [--restarts R] [--delete] [--stop] [--dry-run] COMMAND [ARGUMENT...]
#   e.g. launch/tpu_vm.sh --project mine --zone us-west4-a --name pod --type v5litepod-16 --version v2-alpha-tpuv5-lite
#          --bucket my-runs run configs/seekr_llama2_7b_trace.yaml output=shared/trace
#
#   COMMAND ...      the jaxcl command line without `jaxcl`
#   --project P      Google Cloud project
#   --zone Z         zone
#   --name NAME      of the queued resource and its node; created if it is not there and --type is given
#   --type T         accelerator type, such as v5litepod-16
#   --version V      runtime version, such as v2-alpha-tpuv5-lite
#   --spot           a cheaper pod that may be taken away
#   --bucket B       Cloud Storage bucket, mounted as DIR/shared on all workers: a run folder of several workers must
#                    lie on storage that they share
#   --directory DIR  where to copy to and run, in the home folder of each worker (default: jaxcl)
#   --restarts R     how often all are started again when a process dies (default: 0); they go on from the last checkpoint
#   --delete         delete the queued resource at the end, however the run ended; alone: do only that
#   --stop           tell the run to save and end, without a COMMAND
#   --dry-run        print what would be run, and run nothing
#   --help           this text
#
# The tracked files of the current folder are copied as they are. Lines of all workers come as they are written, with
# the worker's name before them, and are kept in NAME.log here. Ctrl-C, SIGTERM and SIGUSR1 go to all workers: they save
# after the step at hand and end with 130; the same command goes on. Programs outlive this script if it is killed.
# Environment: JAXCL_TOKEN, by which the processes know each other (default: random; copied to the workers as a file).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

project="" zone="" name="" type="" version="" bucket="" directory=jaxcl restarts=0 spot=() delete=0 stop=0 dry_run=0
while (($#)); do
  case $1 in
    --help) print_help "$0" && exit 0 ;;
    --project) needs_value "$1" $# && project=$2 && shift 2 ;;
    --zone) needs_value "$1" $# && zone=$2 && shift 2 ;;
    --name) needs_value "$1" $# && name=$2 && shift 2 ;;
    --type) needs_value "$1" $# && type=$2 && shift 2 ;;
    --version) needs_value "$1" $# && version=$2 && shift 2 ;;
    --bucket) needs_value "$1" $# && bucket=$2 && shift 2 ;;
    --directory) needs_value "$1" $# && directory=$2 && shift 2 ;;
    --restarts) needs_value "$1" $# && restarts=$2 && shift 2 ;;
    --spot) spot=(--spot) && shift ;;
    --delete) delete=1 && shift ;;
    --stop) stop=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -*) usage_error "unknown option $1" ;;
    *) break ;;
  esac
done
for option in project zone name; do
  [[ ${!option} =~ ^[a-z0-9][a-z0-9.:-]*$ ]] || usage_error "--$option: expected a name of Google Cloud, got '${!option}'"
done
whole_number --restarts "$restarts"
[[ -z $type || -n $version ]] || usage_error "--type needs --version"
((stop || delete)) || (($#)) || usage_error "expected a command"
arguments=("$@")
place=(--project "$project" --zone "$zone")

# Runs a command, or prints it.
run() {
  if ((dry_run)); then quoted "$@" && echo; else "$@"; fi
}
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all "--command=$1"
}

create() {
  local create=(gcloud compute tpus queued-resources create "$name" --node-id "$name" "${place[@]}"
    --accelerator-type "$type" --runtime-version "$version" "${spot[@]}")
  local look=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)")
  if ((dry_run)); then
    echo '# unless it is there, and then until it is ACTIVE:'
    quoted "${create[@]}" && echo
    quoted "${look[@]}" && echo
    return
  fi
  "${look[@]}" >/dev/null 2>&1 || "${create[@]}"
  local state=""
  while [[ $state != ACTIVE ]]; do
    state=$("${look[@]}")
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        printf '%s: the queued resource %s is %s; delete it with --delete and ask again\n' "${0##*/}" "$name" "$state" >&2
        exit 1
        ;;
      *) printf '%s: %s is %s\n' "${0##*/}" "$name" "$state" >&2 && sleep 30 ;;
    esac
  done
}

# shellcheck disable=SC2016 # expanded by the workers' shells
unpack='mkdir -p -- "$1/.launch" && mv jaxcl-launch.token "$1/.launch/token" && tar -xzf jaxcl-launch.tar.gz -C "$1" && cd -- "$1" &&
{ test -x .venv/bin/python || python3 -m venv .venv; } && .venv/bin/pip install --quiet -e ".[tpu]"'
# shellcheck disable=SC2016
mount='mkdir -p -- "$1/shared" && { mountpoint -q "$1/shared" || gcsfuse --implicit-dirs "$2" "$1/shared"; }'

install() {
  local archive=.launch/jaxcl-launch.tar.gz token=.launch/jaxcl-launch.token
  run mkdir -p .launch
  if ((dry_run)); then
    printf "git ls-files -z | tar -czf %s --null --files-from -\n" "$(quoted "$archive")"
  else
    git ls-files -z | tar -czf "$archive" --null --files-from -
    rm -f "$token"
    (umask 077 && printf '%s\n' "$JAXCL_TOKEN" >"$token") # a file: command lines are seen by all users
  fi
  run gcloud compute tpus tpu-vm scp "$archive" "$token" "$name:" "${place[@]}" --worker=all
  on_workers "$(remote_line "$unpack" "$directory")"
  [[ -z $bucket ]] || on_workers "$(remote_line "$mount" "$directory" "$bucket")"
}

stop_member() { on_workers "$(remote_line "$remote_signal" "$directory" run "$2")" || true; }

if ((stop)); then
  stop_member 0 TERM
  exit 0
fi
status=0
if ((${#arguments[@]})); then
  [[ -z $type ]] || create
  share_token
  install
  start=$(remote_line "$remote_start" "$directory" run host env .venv/bin/python -m jaxcl "${arguments[@]}")
  if ((dry_run)); then
    on_workers "$start"
  else
    start_members() {
      on_workers "$start" > >(tee -a "$name.log") 2>&1 </dev/null &
      members[0]=$!
    }
    : >"$name.log"
    pass_on_signals
    run_members "$restarts" || status=$?
  fi
fi
((!delete)) || run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
exit "$status"
