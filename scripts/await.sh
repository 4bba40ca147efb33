# Sourced by scripts that a scheduler may signal.
# await PID: wait for a process of this shell, also when a trapped signal comes in between, and
# return its exit code.
await() {
    local code=0 last=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do # a trap ends a wait before the process has ended
        code=0
        wait "$1" || code=$?
    done
    wait "$1" 2>/dev/null || last=$?
    [ "$last" -eq 127 ] || code=$last # older shells forget the code once they have told it
    return "$code"
}
