# shellcheck shell=bash
# What the launchers share; sourced, not run. Needs bash 4.4.

# A launcher's header is its help: the comment lines after the first line of a file.
print_help() {
  sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$1"
}

# One line on stderr, exit code 2: how it is used is wrong.
usage_error() {
  printf '%s: %s (see %s --help)\n' "${0##*/}" "$1" "$0" >&2
  exit 2
}

# The words as bash would read them again.
quoted() {
  local word words=()
  for word in "$@"; do words+=("${word@Q}"); done
  printf '%s' "${words[*]}"
}

# The words for any POSIX shell (a remote one need not be bash), whatever they hold.
quoted_for_sh() {
  local word words=()
  for word in "$@"; do words+=("'${word//\'/\'\\\'\'}'"); done
  printf '%s' "${words[*]}"
}

positive() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || usage_error "$1: expected a positive whole number, got '$2'"
}

# Checks that option $1 has a value: $2 is how many words are left.
needs_value() {
  (($2 >= 2)) || usage_error "$1 needs a value"
}

# A token by which the processes of a run know each other, in the environment: command lines are seen by all users.
share_token() {
  export JAXCL_TOKEN=${JAXCL_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
}

# Checks that option $1 has a whole number as its value $2.
whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || usage_error "$1: expected a whole number, got '$2'"
}

# --- Several programs as one -------------------------------------------------------------------------------------
#
# `members` holds the pid of each; `stop_member I SIGNAL` (the launcher's own) reaches the program behind number I.
# Each runs in a process group of its own (`set -m`), so that Ctrl-C reaches it once, through here.

members=()
interrupted=0

# A signal to the launcher goes to every program once; they save and end by themselves.
pass_on_signals() {
  set -m
  trap 'interrupt' INT TERM USR1
}

interrupt() {
  interrupted=$((interrupted + 1))
  local index signal=TERM
  ((interrupted == 1)) || signal=KILL
  for index in "${!members[@]}"; do stop_member "$index" "$signal" & done
}

# Waits for all. The first that fails decides the exit code, and the others get `GRACE` seconds (default 10) before
# they are ended: they wait for it. After an interruption (130) they may still be saving and get 120.
wait_for_members() {
  local pid status index result=0 reaper=""
  while ((${#members[@]} > 0)); do
    # Only to sleep until something happens: of programs that end together it may name one alone.
    wait -n "${members[@]}" 2>/dev/null || sleep 0.1
    for index in "${!members[@]}"; do
      pid=${members[$index]}
      kill -0 "$pid" 2>/dev/null && continue
      status=0
      wait "$pid" || status=$?
      unset "members[$index]"
      ((result != 0)) || result=$status
    done
    if ((result != 0 && ${#members[@]} > 0)) && [[ -z $reaper ]]; then
      end_the_rest "$result" &
      reaper=$!
    fi
  done
  [[ -z $reaper ]] || kill -KILL -- "-$reaper" 2>/dev/null || true
  return "$result"
}

# Starts all by `start_members` (the launcher's own) and waits for them. If a process died, all are started again, up to
# $1 times: not after an error that jaxcl said (1, 2), an interruption (130) or a lost connection (ssh's 255).
run_members() {
  local attempt status
  for ((attempt = 1; ; attempt++)); do
    members=() status=0
    start_members
    wait_for_members || status=$?
    case $status in 0 | 1 | 2 | 130 | 255) return "$status" ;; esac
    ((interrupted == 0 && attempt <= $1)) || return "$status"
    printf '%s: a process ended with %s; all are started again (%s of %s)\n' "${0##*/}" "$status" "$attempt" "$1" >&2
  done
}

end_the_rest() {
  local index grace=${GRACE:-10}
  trap - INT TERM USR1
  ((${1} != 130 && interrupted == 0)) || grace=120
  sleep "$grace"
  for index in "${!members[@]}"; do stop_member "$index" TERM; done
  sleep 10
  for index in "${!members[@]}"; do stop_member "$index" KILL; done
}

# --- Programs on other machines ----------------------------------------------------------------------------------
#
# A remote shell gets one line: a fixed script, and all that varies as quoted words behind it. The program runs in a
# session of its own with a log under DIRECTORY/.launch, so that it outlives a lost connection; the connection follows
# the log and returns the program's exit code.

# Words: DIRECTORY NAME PREFIX PROGRAM [ARGUMENT...]; PREFIX `host` puts the machine's name before each line. The token is
# in DIRECTORY/.launch/token if PREFIX is `host`, and else the first line of standard input: all users see the words.
# shellcheck disable=SC2016,SC2034 # expanded by the remote shell; used by those who source this
remote_start='cd -- "$1" && mkdir -p .launch || exit 1
log=.launch/$2.log; file=.launch/$2.pid; prefix=; test "$3" != host || prefix="[$(hostname)] "
if test -f "$file" && kill -0 "$(cat "$file")" 2>/dev/null; then
  echo "$2 is already running on $(hostname), process $(cat "$file")" >&2; exit 1
fi
if test "$3" = host; then JAXCL_TOKEN=$(cat .launch/token 2>/dev/null); else IFS= read -r JAXCL_TOKEN; fi
if test -n "$JAXCL_TOKEN"; then export JAXCL_TOKEN; else unset JAXCL_TOKEN; fi
shift 3
: >"$log" # for `tail`, which may be there before the program
setsid "$@" >"$log" 2>&1 </dev/null &
pid=$!
echo "$pid" >"$file"
tail --pid="$pid" -n +1 -f "$log" | sed -u "s/^/$prefix/"
wait "$pid"; status=$?
rm -f "$file"
exit "$status"'

# Words: DIRECTORY NAME SIGNAL.
# shellcheck disable=SC2016,SC2034
remote_signal='kill -"$3" "$(cat "$1/.launch/$2.pid")"'

# The line for a remote shell: $1 is one of the scripts above or any other, the rest its words.
remote_line() {
  local script=$1
  shift
  quoted_for_sh sh -c "$script" jaxcl "$@"
}
