#!/bin/sh
# Starts redis with its password from a file: not in the environment, not among the arguments.
set -eu
secret=/run/prefixd/secrets/redis_password
until [ -s "$secret" ]; do sleep 0.2; done # where the composer does not wait for the service `setup`
password="$(cat "$secret")"
exec redis-server /etc/prefixd/redis.conf - <<CONFIG
requirepass "$password"
maxmemory ${REDIS_MAXMEMORY:-1gb}
CONFIG
