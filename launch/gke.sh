#!/usr/bin/env bash
# Runs a jaxcl command on GKE (or any Kubernetes with JobSet), one process a machine: applies a JobSet, follows the logs
# of process 0 and waits for the end.
#
# usage: launch/gke.sh --name NAME --image IMAGE --machines N (--tpu TYPE:TOPOLOGY:CHIPS [--slices S] | --gpus G)
#          [--gpu-type T] [--claim PVC] [--restarts R] [--grace S] [--namespace NS] [--stop] [--dry-run]
#          COMMAND [ARGUMENT...]
#   e.g. launch/gke.sh --name trace --image REGISTRY/jaxcl:1 --machines 4 --tpu tpu-v5-lite-podslice:4x4:4
#          --claim runs run configs/seekr_llama2_7b_trace.yaml output=/shared/trace
#
#   COMMAND ...      the jaxcl command line without `jaxcl`
#   --name NAME      of the JobSet
#   --image IMAGE    container image with python3 and jaxcl in it
#   --machines N     machines (of a slice)
#   --tpu T:P:C      GKE's accelerator label, its topology, and the chips of one machine
#   --slices S       TPU slices (default: 1)
#   --gpus G         GPUs of one machine
#   --gpu-type T     GKE's accelerator label of the GPU, such as nvidia-h100-80gb
#   --claim PVC      persistent volume claim, shared by all machines, mounted as /shared: for run folder and data
#   --restarts R     how often all are started again after a failure (default: 10); they go on from the last checkpoint
#   --grace S        seconds from SIGTERM to SIGKILL, to save in (default: 300)
#   --namespace NS   Kubernetes namespace
#   --stop           delete the JobSet: its pods save and end, without a COMMAND
#   --dry-run        print the JobSet and what would be run, and change nothing
#   --help           this text
#
# Environment: JAXCL_TOKEN, by which the processes know each other (default: random; in the secret NAME-token).
# Ctrl-C ends only the following of the logs; see --stop. A pod that gets SIGTERM (a drained node, --stop) makes all save
# after the step at hand; after a drain JobSet starts them again, and they go on.
set -euo pipefail
folder=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$folder/common.sh"

name="" image="" machines="" tpu="" slices=1 gpus="" gpu_type="" claim="" restarts=10 grace=300 scope=() stop=0 dry_run=0
while (($#)); do
  case $1 in
    --help) print_help "$0" && exit 0 ;;
    --name) needs_value "$1" $# && name=$2 && shift 2 ;;
    --image) needs_value "$1" $# && image=$2 && shift 2 ;;
    --machines) needs_value "$1" $# && machines=$2 && shift 2 ;;
    --tpu) needs_value "$1" $# && tpu=$2 && shift 2 ;;
    --slices) needs_value "$1" $# && slices=$2 && shift 2 ;;
    --gpus) needs_value "$1" $# && gpus=$2 && shift 2 ;;
    --gpu-type) needs_value "$1" $# && gpu_type=$2 && shift 2 ;;
    --claim) needs_value "$1" $# && claim=$2 && shift 2 ;;
    --restarts) needs_value "$1" $# && restarts=$2 && shift 2 ;;
    --grace) needs_value "$1" $# && grace=$2 && shift 2 ;;
    --namespace) needs_value "$1" $# && scope=("--namespace=$2") && shift 2 ;;
    --stop) stop=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -*) usage_error "unknown option $1" ;;
    *) break ;;
  esac
done
# A pod is called NAME-workers-SLICE-MACHINE-xxxxx, and must fit a host name.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  usage_error "--name: expected at most 40 small letters, digits and '-', got '$name'"

# The words as a JSON list of strings; Kubernetes would expand $(NAME) in them, and reads $$ as $.
json_strings() {
  local word list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//$'\r'/\\r}
    [[ ! $word =~ [[:cntrl:]] ]] || usage_error "control characters cannot be handed on: ${word@Q}"
    list+="${list:+, }\"$word\""
  done
  printf '[%s]' "$list"
}
json_string() {
  local list
  list=$(json_strings "$1")
  printf '%s' "${list:1:-1}"
}

delete=(kubectl "${scope[@]}" delete jobset "$name")
delete_token=(kubectl "${scope[@]}" delete secret "$name-token" --ignore-not-found)
if ((stop)); then
  if ((dry_run)); then
    quoted "${delete[@]}" && echo
    quoted "${delete_token[@]}" && echo
    exit 0
  fi
  "${delete[@]}"
  exec "${delete_token[@]}"
fi
(($#)) || usage_error "expected a command"
[[ -n $image ]] || usage_error "--image is missing"
positive --machines "$machines"
positive --slices "$slices"
positive --grace "$grace"
whole_number --restarts "$restarts"
[[ (-n $tpu && -z $gpus) || (-z $tpu && -n $gpus) ]] || usage_error "give one of --tpu and --gpus"

token="{\"name\": \"JAXCL_TOKEN\", \"valueFrom\": {\"secretKeyRef\": {\"name\": \"$name-token\", \"key\": \"token\"}}}"
environment="[$token]" selector='{}' annotations='{}'
if [[ -n $tpu ]]; then
  [[ $tpu =~ ^([a-z0-9-]+):([0-9x]+):([1-9][0-9]*)$ ]] || usage_error "--tpu: expected TYPE:TOPOLOGY:CHIPS, got '$tpu'"
  # GKE tells the pods of a slice of each other (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES).
  selector="{\"cloud.google.com/gke-tpu-accelerator\": \"${BASH_REMATCH[1]}\", \"cloud.google.com/gke-tpu-topology\": \"${BASH_REMATCH[2]}\"}"
  resources="{\"limits\": {\"google.com/tpu\": \"${BASH_REMATCH[3]}\"}}"
  annotations='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
else
  positive --gpus "$gpus"
  ((slices == 1)) || usage_error "--slices is for --tpu"
  [[ -z $gpu_type ]] || selector="{\"cloud.google.com/gke-accelerator\": $(json_string "$gpu_type")}"
  resources="{\"limits\": {\"nvidia.com/gpu\": \"$gpus\"}}"
  environment="[$token, {\"name\": \"JAX_COORDINATOR_ADDRESS\", \"value\": \"$name-workers-0-0.$name:8476\"}, \
{\"name\": \"JAX_NUM_PROCESSES\", \"value\": \"$machines\"}, \
{\"name\": \"JAX_PROCESS_ID\", \"valueFrom\": {\"fieldRef\": \
{\"fieldPath\": \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}}]"
fi
mounts='[]' volumes='[]'
if [[ -n $claim ]]; then
  mounts='[{"name": "shared", "mountPath": "/shared"}]'
  volumes="[{\"name\": \"shared\", \"persistentVolumeClaim\": {\"claimName\": $(json_string "$claim")}}]"
fi
declare -A values=(
  [NAME]="\"$name\"" [JOBSET_ANNOTATIONS]=$annotations [RESTARTS]=$restarts [SLICES]=$slices [MACHINES]=$machines
  [GRACE]=$grace [NODE_SELECTOR]=$selector [IMAGE]=$(json_string "$image") [ARGUMENTS]=$(json_strings "${@//\$/\$\$}")
  [ENVIRONMENT]=$environment [RESOURCES]=$resources [MOUNTS]=$mounts [VOLUMES]=$volumes
)

# Prints the template with its values, a line at a time: a value that looks like a %WORD% stays as it is.
manifest() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^([^#%]*)%([A-Z_]+)%$ ]]; then
      line=${BASH_REMATCH[1]}${values[${BASH_REMATCH[2]}]}
    fi
    [[ $line =~ ^\ *# ]] || printf '%s\n' "$line"
  done <"$folder/gke.yaml"
}

# The token is no part of the JobSet, which more people may read than secrets.
secret() {
  printf '%s\n' 'apiVersion: v1' 'kind: Secret' "metadata: {\"name\": \"$name-token\"}" \
    "stringData: {\"token\": $(json_string "$JAXCL_TOKEN")}"
}

apply=(kubectl "${scope[@]}" apply --filename=-)
pod="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
logs=(kubectl "${scope[@]}" logs --follow "--selector=$pod" --tail=-1)
state=(kubectl "${scope[@]}" get jobset "$name" '--output=jsonpath={.status.terminalState}')
if ((dry_run)); then
  manifest
  echo "# a secret $name-token with the token of the run, then"
  echo '# the manifest above goes to the first of these; the rest follow the run until its state is Completed or Failed:'
  printf '# %s\n' "$(quoted "${apply[@]}")" "$(quoted "${logs[@]}")" "$(quoted "${state[@]}")"
  exit 0
fi
share_token
secret | "${apply[@]}"
manifest | "${apply[@]}"
while :; do # until the pod is there, and again after each restart
  "${logs[@]}" 2>/dev/null || true
  sleep 15
  case $("${state[@]}") in
    Completed) exit 0 ;;
    Failed) exit 1 ;;
  esac
done
