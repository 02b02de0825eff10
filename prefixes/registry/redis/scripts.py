"""The atomic steps in Redis, as Lua scripts: list a tenant, restore, look, make a change, store, lease, collect.

Owns the scripts and what they answer. They are scripts, and not MULTI behind WATCH: a script is the same on one server
and on a Cluster, knows the server's clock, and recognises a change that is repeated because its answer was lost. All
keys of one call lie in one slot.
"""

from __future__ import annotations

from typing import Final

ENLIST: Final = """
-- KEYS: the registry, its tenants. ARGV: the registry's id, a tenant. Answers 0 where it is not this registry.
local found = redis.call('GET', KEYS[1])
if not found or cjson.decode(found)['id'] ~= ARGV[1] then return 0 end
redis.call('SADD', KEYS[2], ARGV[2])
return 1
"""

RESTORE: Final = """
-- KEYS: the registry, its tenants. ARGV: the registry's id, '1' where it is being restored, tenants to be forgotten, as
--       JSON. Answers 0 as above.
local found = redis.call('GET', KEYS[1])
local mark = found and cjson.decode(found)
if not mark or mark['id'] ~= ARGV[1] then return 0 end
mark['restoring'] = ARGV[2] == '1' or nil
redis.call('SREM', KEYS[2], '')  -- a full Redis runs a script whose first write needs no memory
for _, tenant in ipairs(cjson.decode(ARGV[3])) do redis.call('SREM', KEYS[2], tenant) end
redis.call('SET', KEYS[1], cjson.encode(mark))
return 1
"""

READ_TENANCY: Final = """
-- KEYS: the registry. ARGV: a known revision, and the tenancy, which is no key for the sake of users that may only read
--       it: Redis takes every key of a script for one that it writes. It is in the same slot. Answers the registry, the
--       revision, and the document unless its revision is known.
local revision = redis.call('HGET', ARGV[2], 'revision') or ''
local document = revision ~= ARGV[1] and redis.call('HGET', ARGV[2], 'document')
return {redis.call('GET', KEYS[1]), revision, document}
"""

REPLACE_TENANCY: Final = """
-- KEYS: the registry, its tenancy. ARGV: the registry's id, the revision that must be there, the new revision, the new
--       document, '1' to close the registry. Answers -1 where it is not this registry, 0 where the revision is another.
local found = redis.call('GET', KEYS[1])
local mark = found and cjson.decode(found)
if not mark or mark['id'] ~= ARGV[1] then return -1 end
if (redis.call('HGET', KEYS[2], 'revision') or '') ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[2], '')  -- as above: a full Redis still revokes keys
if ARGV[5] == '1' and not mark['closed'] then
  mark['closed'] = true
  redis.call('SET', KEYS[1], cjson.encode(mark))
end
redis.call('HSET', KEYS[2], 'revision', ARGV[3], 'document', ARGV[4])
return 1
"""

NOTE_USED: Final = """
-- KEYS: the registry, when keys were used. ARGV: the registry's id, then ids and times. Answers as above.
local found = redis.call('GET', KEYS[1])
if not found or cjson.decode(found)['id'] ~= ARGV[1] then return -1 end
for at = 2, #ARGV, 2 do
  local before = redis.call('HGET', KEYS[2], ARGV[at])
  if not before or before < ARGV[at + 1] then redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]) end
end
return 1
"""

NOTE_DENIALS: Final = """
-- KEYS: the registry, the denials. ARGV: the registry's id, how many are kept, then denials. Answers as above.
local found = redis.call('GET', KEYS[1])
if not found or cjson.decode(found)['id'] ~= ARGV[1] then return -1 end
redis.call('LTRIM', KEYS[2], -ARGV[2], -1)  -- as above: a full Redis runs a script whose first write needs no memory
for at = 3, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[at]) end
redis.call('LTRIM', KEYS[2], -ARGV[2], -1)
return 1
"""

TASK_HEAD: Final = """
-- KEYS: the tenant's id, the task. ARGV: a number of bytes. Answers the id, and the task's first bytes.
return {redis.call('GET', KEYS[1]), redis.call('GETRANGE', KEYS[2], 0, ARGV[1] - 1)}
"""

VERSION_HEAD: Final = """
-- KEYS: the tenant's id, the tasks that name an artifact, the artifact. ARGV: a task, a number of bytes.
-- Answers the id, whether the task is among them, and the artifact's first bytes.
return {redis.call('GET', KEYS[1]), redis.call('SISMEMBER', KEYS[2], ARGV[1]),
        redis.call('GETRANGE', KEYS[3], 0, ARGV[2] - 1)}
"""

BEGIN: Final = """
-- KEYS: the tenant's id, the task. Answers the server's clock in milliseconds, and both.
local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}
"""

TOTAL: Final = """
-- KEYS: the audit, the total. Answers the last change ('' for none), then tasks, versions and bytes if the total is of
--       that change. A tenant without a change has nothing.
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
last = last[1] and last[1][1] or ''
local total = redis.call('HMGET', KEYS[2], 'at', 'tasks', 'versions', 'bytes')
if (total[1] or '') ~= last then return {last} end
return {last, total[2] or '0', total[3] or '0', total[4] or '0'}
"""

NOTE_TOTAL: Final = """
-- KEYS: the tenant's id, the audit, the total. ARGV: the registry's id, the last change when the counting began, tasks,
--       versions, bytes. Answers 0 where there was a change meanwhile, or the data is another registry's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if (last[1] and last[1][1] or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[3], 'at', ARGV[2], 'tasks', ARGV[3], 'versions', ARGV[4], 'bytes', ARGV[5])
return 1
"""

COMMIT: Final = """
-- KEYS: the change's id (keys.done), the tenant's id, the task, the deleted, the audit, the total, then those of the
--       operations, of which the first adds to the audit.
-- ARGV: the registry's id, the latest time in milliseconds, sha1 of the task as it was planned on ('' for none),
--       a deleted task that must be there (or ''), operations as JSON, keys that must be there as JSON,
--       channel (or '') and message of the announcement, what is added in tasks, versions and bytes as JSON, how many
--       of each the tenant may have (-1 for any number) or ''.
-- A total that is not of the last change, which an older release has made, is removed: the tenant is counted anew.
if redis.call('EXISTS', KEYS[1]) == 1 then return 'made' end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'foreign' end
local time = redis.call('TIME')
if time[1] * 1000 + time[2] / 1000 > tonumber(ARGV[2]) then return 'late' end
local task = redis.call('GET', KEYS[3])
if (task and redis.sha1hex(task) or '') ~= ARGV[3] then return 'again' end
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[4], ARGV[4]) == 0 then return 'gone' end
for _, key in ipairs(cjson.decode(ARGV[6])) do
  if redis.call('EXISTS', KEYS[key]) == 0 then return 'missing' end
end
local last = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)
local before = redis.call('HMGET', KEYS[6], 'at', 'tasks', 'versions', 'bytes')
local counted = (before[1] or '') == (last[1] and last[1][1] or '')
local added, total = cjson.decode(ARGV[9]), {}
for index, more in ipairs(added) do total[index] = tonumber(before[index + 1] or 0) + more end
if ARGV[10] ~= '' then
  if not counted then return 'again' end
  for index, most in ipairs(cjson.decode(ARGV[10])) do
    if added[index] > 0 and most >= 0 and total[index] > most then return 'again' end
  end
end
local operations, change = cjson.decode(ARGV[5]), nil
-- A full Redis refuses a script whose first write may need memory. This DEL needs none, so a clean-up, a delete and a
-- rollback are made. A publish was refused before, with its lease.
redis.call('DEL', KEYS[1])
for _, operation in ipairs(operations) do
  local answer = redis.call(operation[1], KEYS[operation[2]], unpack(operation, 3))
  change = change or answer
end
if counted then
  for index, count in ipairs(total) do total[index] = string.format('%.0f', count) end
  redis.call('HSET', KEYS[6], 'at', change, 'tasks', total[1], 'versions', total[2], 'bytes', total[3])
else
  redis.call('DEL', KEYS[6])
end
redis.call('SET', KEYS[1], '1', 'EX', 600)
-- The change is made. A user without the right to announce it gets no error; listeners poll then.
if ARGV[7] ~= '' then redis.pcall('PUBLISH', ARGV[7], ARGV[8]) end
return 'made'
"""

REPLACE_AUDIT: Final = """
-- KEYS: the tenant's id, its audit. ARGV: the registry's id, how many entries are kept, entries as JSON, the oldest
--       first. Answers 0 where the data is another registry's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
for _, fields in ipairs(cjson.decode(ARGV[3])) do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(fields))
end
return 1
"""

LEASE: Final = """
-- KEYS: the tenant's id, the lease, the blobs. ARGV: the registry's id, the publisher, milliseconds, the digest.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('SADD', KEYS[3], ARGV[4])
return 1
"""

ADD_PIECE: Final = """
-- KEYS: the pieces so far. ARGV: where the next one begins, the piece, seconds that they stay. Answers their bytes.
-- A piece is added behind exactly those before it, and once if it is sent twice.
if redis.call('STRLEN', KEYS[1]) == tonumber(ARGV[1]) then
  redis.call('APPEND', KEYS[1], ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return redis.call('STRLEN', KEYS[1])
"""

PLACE: Final = """
-- KEYS: the pieces, the artifact. ARGV: its bytes. Answers how many the artifact has then.
if redis.call('STRLEN', KEYS[1]) == tonumber(ARGV[1]) then
  redis.call('PERSIST', KEYS[1])
  redis.call('RENAME', KEYS[1], KEYS[2])
end
return redis.call('STRLEN', KEYS[2])
"""

COLLECT: Final = """
-- KEYS: the artifact, the tasks that name it, its leases, the blobs, the tenant's id.
-- ARGV: the digest, '1' to remove it, the registry's id.
-- Answers its bytes, or -1 where a task or a publisher's lease keeps it, or the data is another registry's.
if redis.call('GET', KEYS[5]) ~= ARGV[3] then return -1 end
local time = redis.call('TIME')
if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
if redis.call('ZCOUNT', KEYS[3], time[1] * 1000 + math.floor(time[2] / 1000), '+inf') > 0 then return -1 end
local size = redis.call('STRLEN', KEYS[1])
if ARGV[2] == '1' then
  redis.call('UNLINK', KEYS[1], KEYS[3])
  redis.call('SREM', KEYS[4], ARGV[1])
end
return size
"""
