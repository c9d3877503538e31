#!/bin/sh
# Install Chromium, unless it is there. Debian and Ubuntu.
set -e
for name in chromium chromium-browser google-chrome; do
    command -v $name > /dev/null && exit 0
done
command -v apt-get > /dev/null || { echo "Chromium is not installed, and there is no apt-get: install chromium"; exit 1; }
root=
[ "$(id -u)" = 0 ] || root=sudo
echo "Installing Chromium (once; a minute)"
$root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq --no-install-recommends chromium > /dev/null
