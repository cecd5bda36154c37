# Sourced by scripts/demo and scripts/test: installs what is missing, once.
# Debian packages through apt (as root or with sudo), Python packages into .venv of the checkout.
# Firewalls to test beside are unpacked there, too: an installed one would start on this machine.

packages=(
  etcd:etcd-server nft:nftables iptables:iptables wg:wireguard-tools wireguard-go:wireguard-go
  ip:iproute2 conntrack:conntrack ipset:ipset unshare:util-linux ping:iputils-ping openssl:openssl
)

compiler=(gcc:gcc gcc:libc6-dev) # python-iptables, a witness in tests, comes as source

say() { printf '%s\n' "$*" >&2; }
fail() { say "$(basename "$0"): $*"; exit 1; }

install_packages() { # further PROGRAM:PACKAGE pairs may be given
  local missing=() entry
  PATH="$PATH:/usr/sbin:/sbin"
  for entry in "${packages[@]}" "$@"; do
    command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
  done
  command -v python3 >/dev/null || missing+=(python3)
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  [ $# -eq 0 ] || has_headers || missing+=(python3-dev)
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null ||
    fail "missing: ${missing[*]}; install them (this is not Debian or Ubuntu: no apt-get)"
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "missing: ${missing[*]}; run as root once to install them"
    root=(sudo)
  fi
  say "installing Debian packages: ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { "${root[@]}" apt-get update -q &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    fail "apt-get could not install ${missing[*]}"
  fi
  rm -f "$log"
}

has_headers() {
  python3 -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null
}

check_python() {
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, and this is $(python3 -V); Debian 12 and Ubuntu 24.04 have it"
}

install_python() { # $1: what of the project to install, e.g. ".[dev]"
  local stamp wanted
  check_python
  wanted="$1 $(python3 -V) $(sha256sum <pyproject.toml) $PWD"
  stamp=.venv/installed
  [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp" && return
  say "installing Python packages into .venv"
  [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null || python3 -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check -e "$1" ||
    fail "pip could not install $1"
  printf '%s\n' "$wanted" >>"$stamp"
}

unpack_firewalls() { # ufw and firewalld with what they need that is not installed
  local scratch target=.venv/firewalls
  [ -e "$target/complete" ] && return
  if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    say "no apt-get here: tests beside ufw and firewalld are skipped"
    return
  fi
  say "unpacking ufw and firewalld into $target"
  scratch=$(mktemp -d)
  if download_packages "$scratch" ufw firewalld python3-firewall; then
    rm -rf "$target"
    mkdir -p "$target/usr/lib"
    local package
    for package in "$scratch"/archives/*.deb; do dpkg-deb -x "$package" "$target"; done
    [ ! -d "$target/lib" ] || { cp -a "$target/lib/." "$target/usr/lib/" && rm -rf "$target/lib"; }
    touch "$target/complete"
  else
    say "apt-get could not download them, their tests are skipped: $(tail -n 1 "$scratch/log")"
  fi
  rm -rf "$scratch"
}

download_packages() { # $1: a directory; the rest: packages.  Needs no rights, installs nothing
  local scratch=$1
  shift
  mkdir -p "$scratch/archives/partial"
  apt-get -q -y --no-install-recommends --download-only --reinstall -o Debug::NoLocking=1 \
    -o Dir::Cache="$scratch" -o Dir::Cache::archives="$scratch/archives" \
    install "$@" >"$scratch/log" 2>&1
}
