# Sourced by scripts that take sources of text or conversations; paths may hold spaces, quotes and line breaks.

# named VALUE: whether a file or folder exists whose name it holds, as NAME=PATH, PATH@N, PATH:WEIGHT or PATH#FIELD
named() {
    local path
    for path in "$1" "${1#*=}"; do
        path=${path/#\~\//$HOME/}
        while :; do
            [ -e "$path" ] && return
            [[ "$path" =~ ^(.+)(:[0-9.]+|@[0-9]+|#[^#/:[:space:]]+)$ ]] || break
            path=${BASH_REMATCH[1]}
        done
    done
    return 1
}

# relative VALUE...: whether one of them names a file or folder by a path that begins at the current folder, and so means another elsewhere
relative() {
    local value
    for value; do
        case "$value" in
            /* | *=/* | '~'* | *='~'*) ;;
            *) ! named "$value" || return 0 ;;
        esac
    done
    return 1
}

# sources VALUE: puts the sources of a value into the array `found`. Several in one value, as "a=DIR:1 b=DIR:2", are split at spaces,
# unless the whole names something that exists.
sources() {
    found=("$1")
    [[ "$1" =~ [[:space:]] ]] || return 0
    named "$1" || read -r -d '' -a found <<<"$1" || true
}

# quoted WORD...: the words as a command line that shlex reads back
quoted() {
    local word mark="'" escaped="'\\''"
    for word; do printf "'%s' " "${word//$mark/$escaped}"; done
}

# planned_run SCRIPT FLAGS... -- WORDS...: the beginning of every script of fixed length. FLAGS go to `plan day`; WORDS are those of the user.
# -h shows the first lines of the script. --dry_run, with further flags of `plan day`, prints the page and stops. Otherwise the page is printed and
# sets shards, vocab and rows; the script stops if disk, memory or text do not suffice. This happens once, at the first start with these flags.
# $own names the tokenizer of the script, for tokenizer_of.
planned_run() {
    local script=$1 flags=() more=() settled word
    shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    case "${1:-}" in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "runs/$script"; exit 0 ;;
        "" | --dry_run) ;;
        *) echo "error: $script has no option $1: use --dry_run or -h" >&2; exit 2 ;;
    esac
    source runs/environment.sh
    if [ "${1:-}" = --dry_run ]; then
        # A card that is named replaces the script's, with their number; a number alone replaces the number
        for word in "${@:2}"; do
            case "$word" in
                --gpu | --gpu=*) word="--gpu*" ;;
                --gpus | --gpus=*) word="--gpus=*" ;;
                *) continue ;;
            esac
            for i in "${!flags[@]}"; do case "${flags[i]}" in $word) unset "flags[i]" ;; esac; done
        done
        more=("${@:2}")
        exec python -m scripts.plan day "${flags[@]}" --script="runs/$script" ${more[@]+"${more[@]}"}
    fi
    # The plan is fixed at the first start with these flags, because later starts find a part of what it needs on the disk already
    local key
    key=$(printf '%s\n' "${flags[@]}" | cksum)
    own="$NANOCHAT_BASE_DIR/plan/$script-${key%% *}"
    [ -e "$own.settled" ] || {
        settled=$(python -m scripts.plan day "${flags[@]}" --script="runs/$script" --shell) || exit
        mkdir -p "$(dirname "$own")"
        printf '%s\n' "$settled" >"$own.settled"
    }
    source "$own.settled"
    own="$own.tokenizer"
}
