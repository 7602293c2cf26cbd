#!/usr/bin/env bash
# Installs what is missing into .venv beside this file, then trains.
#
#   ./launch.sh                                     quick start: configs/ldm_cfg.py on handwritten digits
#   ./launch.sh --config=FILE --workdir=FOLDER ...  arguments of `python -m jaxdiff.main`; paths are relative
#                                                   to where you are
#   ./launch.sh test [pytest arguments]             the tests, from the repository root
#
# Several GPUs of one host: nothing to do, one process uses all of them (CUDA_VISIBLE_DEVICES chooses).
# Several hosts: one process on each, which find each other through Slurm,
#
#   srun --nodes=4 --ntasks-per-node=1 ./launch.sh --config=... --workdir=...
#
# or, started by hand or by another scheduler, through three variables:
#
#   JAXDIFF_COORDINATOR=host0:1234 JAXDIFF_NUM_PROCESSES=4 JAXDIFF_PROCESS_ID=0 ./launch.sh ...   (0 to 3)
#
# The hosts may share this folder: one process installs, the others wait for it.
#
# Environment:
#   JAXDIFF_ACCELERATOR=cpu|cuda12|cuda13  build of JAX; chosen by the NVIDIA driver when not set. GPUs older
#                                          than Turing (V100, P100) need cuda12 whatever the driver.
#   JAXDIFF_PYTHON=python3.12              interpreter (3.11 to 3.13) that .venv is made with; default python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
stamp=$venv/jaxdiff-installed # written last: an interrupted installation has none

say() { echo "launch.sh: $*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

check_distributed() {
  local name given="" missing=""
  for name in JAXDIFF_COORDINATOR JAXDIFF_NUM_PROCESSES JAXDIFF_PROCESS_ID; do
    if [[ -n ${!name:-} ]]; then given+=" $name"; else missing+=" $name"; fi
  done
  [[ -z $given || -z $missing ]] || fail "not set:$missing, but set:$given; several hosts need all three"
}

# Sets `wanted` to the build of JAX for this machine and `why` to the reason.
choose_accelerator() {
  local header driver cuda=""
  wanted=${JAXDIFF_ACCELERATOR:-}
  if [[ -n $wanted ]]; then
    [[ $wanted =~ ^(cpu|cuda12|cuda13)$ ]] ||
      fail "JAXDIFF_ACCELERATOR=$wanted: must be cpu, cuda12 or cuda13"
    why="JAXDIFF_ACCELERATOR"
    return
  fi
  wanted=cpu
  if ! command -v nvidia-smi >/dev/null; then
    why="no nvidia-smi"
  elif ! header=$(nvidia-smi 2>/dev/null); then
    why="nvidia-smi fails"
  else
    # "CUDA Version: 12.4", in newer drivers "CUDA UMD Version: 13.1"; else the driver's own version tells.
    if [[ $header =~ CUDA(\ [A-Z]+)?\ Version:\ *([0-9]+) ]]; then
      cuda=${BASH_REMATCH[2]}
    elif [[ $header =~ Driver\ Version:\ *([0-9]+) ]]; then
      driver=${BASH_REMATCH[1]}
      cuda=$((driver >= 580 ? 13 : driver >= 525 ? 12 : 11))
    fi
    if [[ -z $cuda ]]; then
      why="nvidia-smi names no driver version"
    elif ((cuda >= 13)); then
      wanted=cuda13 why="the driver supports CUDA $cuda"
    elif ((cuda == 12)); then
      wanted=cuda12 why="the driver supports CUDA 12"
    else
      why="the NVIDIA driver is too old: it supports CUDA $cuda, JAX needs 12"
    fi
  fi
}

# Sets have_* to what the stamp says; all empty when there is no stamp, or the folder was moved since.
read_stamp() {
  have_accelerator="" have_test="" have_python="" have_sources="" have_root=""
  [[ -r $stamp && -x $venv/bin/python ]] || return 0
  { read -r have_accelerator have_test have_python have_sources && read -r have_root; } <"$stamp" || true
  if [[ $have_root != "$root" ]]; then
    have_accelerator="" have_test="" have_python="" have_sources=""
  fi
}

# Whether what is installed will do. A CUDA build also runs without GPU, and cuda12 on newer drivers: unless
# JAXDIFF_ACCELERATOR asks for another one it stays, so that unlike hosts can share a folder.
accelerator_will_do() {
  [[ $have_accelerator == "$wanted" ]] && return 0
  [[ -z ${JAXDIFF_ACCELERATOR:-} ]] || return 1
  case $have_accelerator-$wanted in cuda12-cpu | cuda13-cpu | cuda12-cuda13) return 0 ;; *) return 1 ;; esac
}

up_to_date() {
  read_stamp
  [[ -n $have_accelerator && $have_sources == "$sources" ]] &&
    [[ $need_test == no || $have_test == yes ]] &&
    [[ -z $python_version || $have_python == "$python_version" ]] &&
    accelerator_will_do
}

# Sets `python_version`, such as 3.12, to that of interpreter $1.
check_python() {
  command -v "$1" >/dev/null || fail "$1 not found; JAXDIFF_PYTHON names the Python (3.11 to 3.13) to use"
  python_version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$1 does not run"
  case $python_version in
    3.11 | 3.12 | 3.13) ;;
    *) fail "$1 is Python $python_version; JAXDIFF_PYTHON must name one of 3.11, 3.12, 3.13" ;;
  esac
}

# One installer at a time, also across hosts; until `unlock`, or the end of this process and its children.
lock() {
  local code=0 waited=no waiting="waiting for another process that installs"
  held=flock
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock -n 9 || code=$?
    if ((code == 1)); then
      say "$waiting"
      code=0
      flock 9 || code=$?
    fi
    if ((code == 0)); then return; fi
    exec 9>&- # a file system without locks
  fi
  held=$root/.venv.lock.d
  until mkdir "$held" 2>/dev/null; do
    [[ -w $root ]] || fail "cannot write to $root"
    [[ $waited == yes ]] || say "$waiting; if there is none, remove $held"
    waited=yes
    sleep 1
  done
  trap 'rmdir "$held"' EXIT
}

unlock() {
  if [[ $held == flock ]]; then
    exec 9>&-
  else
    rmdir "$held"
    trap - EXIT
  fi
}

install() {
  local python=${JAXDIFF_PYTHON:-python3} accelerator=$wanted test=$need_test extras="" clear="" plugin
  # What is there already stays: a plain start after `test` keeps the tests' packages.
  [[ $have_test == yes ]] && test=yes
  [[ -n $have_accelerator ]] && accelerator_will_do && accelerator=$have_accelerator
  if [[ -e $venv ]]; then
    # Begin anew where Python differs or does not run, the folder moved, or another CUDA build is in the way.
    [[ $(venv_version) == "${python_version:-3.}"* && ${have_root:-$root} == "$root" ]] || clear=--clear
    for plugin in "$venv"/lib/python*/site-packages/jax_cuda*_plugin; do
      [[ ! -e $plugin || $plugin == */jax_"$accelerator"_plugin ]] || clear=--clear
    done
  fi
  rm -f "$stamp"
  if [[ -n $clear ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    check_python "$python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python has no venv module; on Debian and Ubuntu: apt install python$python_version-venv"
    say "making $venv with Python $python_version"
    "$python" -m venv $clear "$venv"
  fi
  [[ $accelerator == cpu ]] || extras=$accelerator
  [[ $test == yes ]] && extras+=${extras:+,}test
  say "installing jaxdiff${extras:+[$extras]} into $venv ($why); this can take minutes"
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c "$root/constraints.txt" \
    -e "$root${extras:+[$extras]}"
  printf '%s\n' "$accelerator $test $(venv_version) $sources" "$root" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# Python version of .venv, empty when it does not run.
venv_version() {
  "$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

[[ -f $root/pyproject.toml ]] ||
  fail "no pyproject.toml in $root; sbatch runs a copy of its script, so let that script run this one"
check_distributed
need_test=no
[[ ${1:-} == test ]] && need_test=yes
python_version="" # empty: any will do
[[ -z ${JAXDIFF_PYTHON:-} ]] || check_python "$JAXDIFF_PYTHON"
choose_accelerator
read -r sources _ < <(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
if ! up_to_date; then
  lock
  up_to_date || install # another process may have installed it meanwhile
  unlock
fi
read_stamp
[[ $have_accelerator == "$wanted" ]] || why+="; the build installed earlier runs here too"
say "JAX for $have_accelerator ($why)"

if [[ $need_test == yes ]]; then
  shift
  cd "$root"
  exec "$venv/bin/python" -m pytest "$@"
fi
(($#)) || set -- "--config=$root/configs/ldm_cfg.py"
exec "$venv/bin/python" -m jaxdiff.main "$@" # exec: signals reach Python
