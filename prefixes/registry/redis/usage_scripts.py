"""The atomic steps of usage in Redis, as Lua scripts, see ``scripts``: add a batch, put a day that is copied.

Owns the scripts and what they answer. All keys of one call have the registry's hash tag.
"""

from __future__ import annotations

from typing import Final

ADD_USAGE: Final = """
-- KEYS: the registry, the days of usage, the day's batches, then the day of each tenant.
-- ARGV: the registry's id, '1' where it is being restored, a writer, the batch's number, when the day ends, the oldest
--       day that is kept, the most rows of a tenant, and as JSON for each tenant: its name among the days, and its
--       rows: field, the field that it is folded to, counts.
-- Answers -1 where it is not this registry, or another one restores it, 0 where the batch was added before.
local found = redis.call('GET', KEYS[1])
local mark = found and cjson.decode(found)
if not mark or mark['id'] ~= ARGV[1] or (mark['restoring'] and ARGV[2] ~= '1') then return -1 end
if tonumber(redis.call('HGET', KEYS[3], ARGV[3]) or 0) >= tonumber(ARGV[4]) then return 0 end
for at, tenant in ipairs(cjson.decode(ARGV[8])) do
  local key = KEYS[3 + at]
  for _, row in ipairs(tenant[2]) do
    local field = row[1]
    local before = redis.call('HGET', key, field)
    if not before and redis.call('HLEN', key) >= tonumber(ARGV[7]) then
      field = row[2]
      before = redis.call('HGET', key, field)
    end
    local sums = {}
    for number in string.gmatch(before or '', '%d+') do sums[#sums + 1] = number end
    for index, count in ipairs(row[3]) do  -- exact up to 2^53
      sums[index] = string.format('%.0f', tonumber(sums[index] or 0) + tonumber(count))
    end
    redis.call('HSET', key, field, table.concat(sums, ' '))
  end
  redis.call('EXPIREAT', key, ARGV[5])
  redis.call('ZADD', KEYS[2], 0, tenant[1])
end
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('EXPIREAT', KEYS[3], ARGV[5])
redis.call('ZREMRANGEBYLEX', KEYS[2], '-', ARGV[6])
return 1
"""

PUT_USAGE: Final = """
-- KEYS: the registry, the days of usage, the day of a tenant. ARGV: the first two as above, when the day ends, its name
--       among the days, then fields and counts; none removes it. Answers as above.
local found = redis.call('GET', KEYS[1])
local mark = found and cjson.decode(found)
if not mark or mark['id'] ~= ARGV[1] or (mark['restoring'] and ARGV[2] ~= '1') then return -1 end
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[4])
if #ARGV == 4 then return 1 end
for at = 5, #ARGV, 2 do redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1]) end
redis.call('EXPIREAT', KEYS[3], ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[4])
return 1
"""

PUT_USAGE_BATCHES: Final = """
-- KEYS: the registry, the day's batches. ARGV: the first two as above, when the day ends, then writers and numbers.
-- Answers as above.
local found = redis.call('GET', KEYS[1])
local mark = found and cjson.decode(found)
if not mark or mark['id'] ~= ARGV[1] or (mark['restoring'] and ARGV[2] ~= '1') then return -1 end
redis.call('DEL', KEYS[2])
for at = 4, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]) end
redis.call('EXPIREAT', KEYS[2], ARGV[3])
return 1
"""
