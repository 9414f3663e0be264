#!/usr/bin/env bash
# What `make run` runs: the example's MCP server, and the gateway in front of it. They live and die together:
# when either ends, or this script is told to stop (Ctrl-C, TERM, a closed terminal), both are stopped.
#
# With job control (set -m) each child is in a process group of its own. So Ctrl-C reaches only this script, and
# the gateway is told once to stop, not twice: a second signal would cut short the calls it is ending.
set -um
cd "$(dirname "${BASH_SOURCE[0]}")/.."

upstream=127.0.0.1:3001 # as in deploy/waybill.yaml
log=build/everything-server.log
pids=()

alive() { kill -0 "$1" 2>/dev/null; }
listening() { (exec 3<>"/dev/tcp/${upstream/:/\/}") 2>/dev/null; }

stop() {
	# Signalled again, stop at once.
	trap 'kill -KILL "${pids[@]}" 2>/dev/null' INT TERM HUP
	((${#pids[@]})) || return
	kill -TERM "${pids[@]}" 2>/dev/null
	# The gateway ends its calls before it goes; 20 s is more than it allows itself.
	for ((i = 0; i < 200; i++)); do
		any=
		for pid in "${pids[@]}"; do alive "$pid" && any=1; done
		[[ $any ]] || break
		sleep 0.1
	done
	[[ $any ]] && kill -KILL "${pids[@]}" 2>/dev/null
	wait 2>/dev/null
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

if listening; then
	echo "run: $upstream is in use, and the example's MCP server needs it: stop what listens there (perhaps another 'make run')" >&2
	exit 1
fi
build/bin/everything-server -http "$upstream" -stateless=true </dev/null >"$log" 2>&1 &
pids+=($!)
until listening; do
	if ! alive "${pids[0]}"; then
		echo "run: the example's MCP server did not start:" >&2
		cat "$log" >&2
		exit 1
	fi
	sleep 0.05
done

bin/waybill up --config deploy/waybill.yaml </dev/null &
pids+=($!)
wait -n -p ended
code=$?
if [[ ${ended:-} == "${pids[0]}" ]]; then
	echo "run: the example's MCP server ended by itself (exit $code); its output is in $log" >&2
	code=1
fi
exit "$code"
