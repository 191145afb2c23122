# What the batch scripts share: starting the tasks of a job, and deciding what becomes of the job when they have ended.
# Tasks never requeue; this does, for exit code 75 (checkpointed, go on later) and for any other death, but not for
# 0 (done), 2 (refused) and 3 (stopped by rule), nor for a job that somebody cancels. README.md here has the reasons.

ATTEMPTS=${TUBELET_ATTEMPTS:-3}     # that may end without a newer checkpoint before the job is given up
KILLED_WITHIN_S=120                 # after `scontrol requeue` SLURM kills the job; this is how long to wait for it
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}           # of an array this task alone: the number of its last task is that of all

# A training run: train_until_done pretrain|finetune ARGUMENTS
train_until_done() {
    local out before code
    out=$(value_of --out "${@:2}")
    if [ -z "$out" ]; then
        echo "$1.sbatch: --out: is missing; give the run's folder, where a requeued job finds its checkpoints" >&2
        exit 2
    fi
    before=$(newest_checkpoint "$out")
    run_tasks "$@"
    code=$?
    code=$(exit_code_in "$out/outcome.json" || echo "$code")
    if is_final "$code"; then
        exit "$code"
    fi
    stop_without_progress "$out" "$before" "$code"
    requeue "$code"
}

# A command that is no training run and goes on where it was cut off: run_command pack|merge ARGUMENTS
run_command() {
    local code
    run_tasks launch "$@"
    code=$?
    if is_final "$code" || { [ "$code" != 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$ATTEMPTS" ]; }; then
        exit "$code"
    fi
    requeue "$code"
}

# Starts `python -m MODULE ARGUMENTS` in each task and returns the exit code: of rank 0 if it ended by itself, else srun's.
run_tasks() {
    local python=("${TUBELET_PYTHON:-python}") options=(--kill-on-bad-exit=1) rank0 step code
    case ${TUBELET_CONTAINER:-} in
        "") ;;
        *.sif) python=(apptainer exec --nv --bind "$PWD" "$TUBELET_CONTAINER" python) ;;
        *) python=(python) options+=(--container-image="$TUBELET_CONTAINER" --container-mounts="$PWD:$PWD"
               --container-workdir="$PWD") ;;
    esac
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}     # srun has not inherited it since SLURM 22.05
    export PYTHONUNBUFFERED=1
    rank0=$(mktemp)
    trap : TERM                     # SLURM ends a job by signalling this shell too; it must outlive the tasks
    srun "${options[@]}" bash -c "$TASK" task "$rank0" "${python[@]}" -m "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"                # a signal cuts it short
    done
    wait "$step"                    # bash remembers how it ended
    code=$?
    code=$(grep . "$rank0" || echo "$code")
    rm -f "$rank0"
    return "$code"
}

# One task. srun returns the highest exit code of all, and kills the others once one has failed: their 137 would hide
# that rank 0 was refused. So rank 0 notes its own code, on the node where this script runs, and the others, who fail with
# it, give it time. The trap keeps this shell alive through the signals that SLURM sends to all of a task's processes.
TASK='
trap : TERM USR1 USR2
rank0=$1
shift
"$@"
code=$?
if [ "$SLURM_PROCID" = 0 ]; then
    echo "$code" 2>/dev/null > "$rank0"
elif [ "$code" = 2 ] || [ "$code" = 3 ] || [ "$code" = 75 ]; then
    trap - TERM
    sleep 10
fi
exit "$code"'

# The last value that an option has among arguments: value_of --out ARGUMENTS
value_of() {
    local name=$1 value='' previous='' argument
    for argument in "${@:2}"; do
        case $argument in
            "$name"=*) value=${argument#*=} ;;
            *) [ "$previous" != "$name" ] || value=$argument ;;
        esac
        previous=$argument
    done
    echo "$value"
}

# The name of the newest complete checkpoint of a run, or nothing.
newest_checkpoint() {
    local manifest folder newest=
    for manifest in "$1"/checkpoints/step-*/manifest.json; do
        folder=${manifest%/manifest.json}
        case $folder in
            *.tmp-*) ;;
            *) [ ! -e "$manifest" ] || newest=${folder##*/} ;;
        esac
    done
    echo "$newest"
}

# The exit code in an outcome.json that this attempt of this job has written; fails where there is none.
exit_code_in() {
    grep -qs "\"job\": \"$SLURM_JOB_ID\"" "$1" && grep -q "\"restarts\": ${SLURM_RESTART_COUNT:-0}\b" "$1" &&
        sed -n 's/^ *"exit_code": \([0-9]*\).*/\1/p' "$1" | grep .
}

is_final() {
    [ "$1" = 0 ] || [ "$1" = 2 ] || [ "$1" = 3 ]
}

# Ends the job when too many attempts in a row have brought no newer checkpoint; their count is in the run's folder.
stop_without_progress() {
    local out=$1 before=$2 code=$3 attempts=0
    if [ "$(newest_checkpoint "$out")" = "$before" ]; then
        attempts=$(($(cat "$out/attempts_without_progress" 2>/dev/null || echo 0) + 1))
    fi
    if [ "$attempts" -ge "$ATTEMPTS" ]; then
        rm -f "$out/attempts_without_progress"
        echo "tubelet: $attempts attempts have ended (the last with exit code $code) without a newer checkpoint than" \
            "${before:-none}; job $JOB is not requeued; see above why, and submit it again" >&2
        exit "$code"
    fi
    mkdir -p "$out" && echo "$attempts" > "$out/attempts_without_progress" || exit "$code"
}

# Puts this job back into the queue, unless somebody is ending it: `scontrol requeue` would revive a cancelled job.
requeue() {
    local job
    job=$(scontrol show job --oneliner "$JOB")
    case $job in
        "")
            echo "tubelet: exit code $1; scontrol does not answer, so job $JOB is not requeued; submit it again" >&2
            exit "$1"
            ;;
        *" JobState=RUNNING "* | *" JobState=SIGNALING "* | *" Reason=TimeLimit "*) ;;
        *)
            echo "tubelet: exit code $1; job $JOB is being ended, so it is not requeued" >&2
            exit "$1"
            ;;
    esac
    echo "tubelet: exit code $1; requeueing job $JOB" >&2
    scontrol requeue "$JOB"
    # Never 0 here: a preempted job whose script ends with 0 counts as completed. SLURM kills this shell.
    sleep "$KILLED_WITHIN_S"
    exit "$1"
}
