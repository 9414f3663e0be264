#!/usr/bin/env bash
# What `make run` runs: the example's MCP server, and the gateway in front of it. They live and die together:
# when either ends, or this script is told to stop (Ctrl-C, TERM, a closed terminal), both are stopped.
#
# Each child is in a session of its own (setsid). So Ctrl-C reaches only this script, and the gateway is told once
# to stop, not twice: a second signal would cut short the calls it is ending.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

upstream=127.0.0.1:3001 # as in deploy/waybill.yaml
log=build/everything-server.log
pids=()

alive() { kill -0 "$1" 2>/dev/null; }
listening() { (exec 3<>"/dev/tcp/${upstream/:/\/}") 2>/dev/null; }

# The gateway first: the calls that it is ending may still want an answer from the server behind it.
stop() {
	trap 'kill -KILL "${pids[@]}"' INT TERM HUP # told twice: at once
	exec 2>/dev/null                             # what is left to say is bash's own "Terminated"
	local i n pid
	for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
		pid=${pids[i]}
		kill -TERM "$pid"
		for ((n = 0; n < 200; n++)); do # 20 s, more than the gateway allows itself
			alive "$pid" || continue 2
			sleep 0.1
		done
		kill -KILL "$pid"
	done
	wait
}
trap stop EXIT
trap 'exit 0' INT # as asked; make would call anything else an error
trap 'exit 143' TERM
trap 'exit 129' HUP

if listening; then
	echo "run: $upstream is in use, and the example's MCP server needs it: stop what listens there (perhaps another 'make run')" >&2
	exit 1
fi
setsid build/bin/everything-server -http "$upstream" -stateless=true </dev/null >"$log" 2>&1 &
pids+=($!)
until listening; do
	if ! alive "${pids[0]}"; then
		echo "run: the example's MCP server did not start:" >&2
		cat "$log" >&2
		exit 1
	fi
	sleep 0.05
done

setsid bin/waybill up --config deploy/waybill.yaml </dev/null &
pids+=($!)
wait -n -p ended
code=$?
if [[ ${ended:-} == "${pids[0]}" ]]; then
	echo "run: the example's MCP server ended by itself (exit $code); its output is in $log" >&2
	code=1
fi
exit "$code"
