#!/usr/bin/env bash
# Install what the tests run and pip does not bring: promtool, Prometheus, Node, npm, zsh, fish,
# PostgreSQL, faketime and Chromium with its driver, by apt.
#
# test_tools.sh yes    install what is missing; fails without root, without apt, or if apt fails
# test_tools.sh auto   the same if CI=true; as root in a container try to; elsewhere do nothing
# test_tools.sh no     do nothing
#
# It never runs sudo.
set -euo pipefail

in_container() {
    [[ -e /.dockerenv || -e /run/.containerenv || -n "${container:-}${KUBERNETES_SERVICE_HOST:-}" ]] \
        || grep -qE 'docker|kubepods|containerd|libpod|podman|lxc' /proc/1/cgroup 2>/dev/null \
        || { command -v systemd-detect-virt >/dev/null && systemd-detect-virt --container --quiet; }
}

missing() {
    local program
    for program in promtool prometheus node npm chromedriver zsh fish faketime; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || printf 'chromium '
    has_postgresql || printf 'postgresql '
}

# Debian has the programs of PostgreSQL's server not in PATH.
has_postgresql() {
    command -v initdb >/dev/null || compgen -G "${POSTGRESQL_FOLDER:-/usr/lib/postgresql}/*/bin/initdb" >/dev/null
}

# One after the other: the nodejs package of some sources brings npm, and conflicts with Debian's.
install_missing() {
    if [[ $(id -u) -ne 0 ]]; then
        echo "needs root to install $(missing)by apt: run \`make test-tools\` as root" >&2
        return 1
    fi
    if ! command -v apt-get >/dev/null; then
        echo "there is no apt-get here: install $(missing)with the package manager of this system" >&2
        return 1
    fi
    echo "installing $(missing)by apt"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || return 1
    apt_install prometheus promtool prometheus && apt_install nodejs node && apt_install npm npm \
        && apt_install chromium-driver chromedriver && apt_install zsh zsh && apt_install fish fish \
        && apt_install faketime faketime
    # The tests take either browser.
    command -v google-chrome >/dev/null || apt_install chromium chromium
    has_postgresql || apt_install postgresql initdb
}

# apt_install PACKAGE PROGRAM...: install the package if one of its programs is missing
apt_install() {
    local package=$1 program
    for program in "${@:2}"; do
        command -v "$program" >/dev/null && continue
        apt-get install -y -qq --no-install-recommends "$package" >/dev/null
        return
    done
}

[[ -n "$(missing)" ]] || exit 0
case "${1:-}" in
    yes) install_missing ;;
    no) ;;
    auto)
        if [[ "${CI:-}" == true ]]; then
            install_missing
        elif [[ $(id -u) -eq 0 ]] && in_container; then
            install_missing || echo "could not install them; the tests that need them are skipped" >&2
        fi
        ;;
    *)
        echo "usage: $0 yes|auto|no" >&2
        exit 2
        ;;
esac
