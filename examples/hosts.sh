#!/bin/bash
# Train with several processes and no scheduler: run this on each host, with its number.
#   examples/hosts.sh HOST_OF_PROCESS_0 NUMBER_OF_HOSTS THIS_HOSTS_NUMBER
# The same works on one machine with 127.0.0.1, a process a terminal. exec lets Ctrl-C and SIGTERM
# reach Python; told on one host, all stop together.
exec python train.py --coordinator_address="$1:1234" --num_processes="$2" --process_id="$3" \
    --out_dir=out/hosts --init_from=auto
