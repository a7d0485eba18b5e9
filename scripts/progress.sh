# Sourced by setup.sh, test.sh and benchmarks/install_ms_swift.sh: shows that a long command is still running.

# with_progress TITLE COMMAND...: runs the command and shows the newest line of its output: on a terminal every second,
# in place; in a log every 20 s. If it fails, the end of the whole output is shown. Returns the command's exit code.
with_progress() {
    local title=$1 output code=0 display
    shift
    output=$(mktemp)
    echo "$title ..."
    _show_newest_line "$output" &
    display=$!
    # A background process of a script ignores Ctrl-C, so it is the display that runs there, not the command.
    trap 'kill "$display" 2>/dev/null || true; rm -f "$output"; trap - INT TERM; kill -INT $$' INT TERM
    "$@" >"$output" 2>&1 </dev/null || code=$?
    trap - INT TERM
    kill "$display" 2>/dev/null || true
    wait "$display" 2>/dev/null || true
    [ ! -t 1 ] || printf '\r\033[K'
    [ "$code" = 0 ] || { tail -n 40 "$output" >&2; echo "$title failed (exit code $code)." >&2; }
    rm -f "$output"
    return "$code"
}

_show_newest_line() {
    local started=$SECONDS pause=${LLAVA_ORPO_LOG_SECONDS:-20} columns line
    [ ! -t 1 ] || pause=1
    while sleep "$pause" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        line=$(tail -c 1000 "$1" 2>/dev/null | tr '\r' '\n' | sed 's/^ *//' | grep . | tail -n 1 || true)
        line="  $((SECONDS - started)) s  $line"
        if [ -t 1 ]; then
            columns=$(stty size <&2 2>/dev/null | cut -d' ' -f2 || true)
            printf '\r\033[K%s' "${line:0:$((${columns:-80} - 1))}"
        else
            echo "$line"
        fi
    done
}

# uv_install TITLE UV PYTHON ARGUMENTS...: `uv pip install`, with uv's own bars on a terminal.
uv_install() {
    local title=$1 uv=$2 python=$3
    shift 3
    if [ -t 2 ]; then
        echo "$title ..."
        "$uv" pip install --python "$python" "$@"
    else
        with_progress "$title" "$uv" pip install --python "$python" "$@"
    fi
}
