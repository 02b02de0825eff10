#!/bin/sh
# Starts redis with its users from a file, which has hashes of their passwords.
set -eu
users=/run/prefixd/secrets/users.acl
until [ -s "$users" ]; do sleep 0.2; done # where the composer does not wait for the service `setup`
exec redis-server /etc/prefixd/redis.conf - <<CONFIG
aclfile $users
maxmemory ${REDIS_MAXMEMORY:-1gb}
CONFIG
