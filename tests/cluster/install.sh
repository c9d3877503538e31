#!/bin/sh
# Install Slurm's daemons and commands, unless they are there. Debian and Ubuntu.
set -e
PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd srun; do
    command -v $program > /dev/null || missing=1
done
[ -n "$missing" ] || exit 0
command -v apt-get > /dev/null || { echo "Slurm is not installed, and there is no apt-get: install slurmctld, slurmd, munge"; exit 1; }
root=
[ "$(id -u)" = 0 ] || root=sudo
echo "Installing Slurm (once; seconds)"
$root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge > /dev/null
