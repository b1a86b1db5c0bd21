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
