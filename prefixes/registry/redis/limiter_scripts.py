"""The limiter's steps in Redis, as Lua scripts: take, settle, renew; and the announcement of a replica.

Owns the scripts, which do what ``prefixes.limiter.windows`` does and answer numbers as texts, since Redis cuts them.
KEYS of each but the last: the tenant's counters (a hash), its reservations (a hash), and these by their end (a sorted
set). ARGV begins with the time in seconds, '' for Redis' own, and an id. Every write but the first may need memory: the
first of a settlement needs none, so that a full Redis takes it.
"""

from __future__ import annotations

from typing import Final

_CLOCK: Final = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function text(number) return string.format('%.17g', number) end
"""

_SHARED: Final = _CLOCK + """
local KEPT, TOLERANCE = 32 * 86400, 1e-6  -- seconds that a tenant is remembered: longer than a month
local function numbers(words)
  local found = {}
  for word in string.gmatch(words or '', '%S+') do found[#found + 1] = tonumber(word) end
  return found
end

-- The number of the month that a day is in, counted from 1970, and the first day of the next one.
local function month_of(day)
  local year, first, leap = 1970, 0, false
  while day >= first + (leap and 366 or 365) do
    first, year = first + (leap and 366 or 365), year + 1
    leap = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)
  end
  for month, length in ipairs({31, leap and 29 or 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}) do
    first = first + length
    if day < first then return (year - 1970) * 12 + month - 1, first end
  end
end
local function period_of(window)
  local day = math.floor(now / 86400)
  if window == 'day' then return day, (day + 1) * 86400 end
  local month, after = month_of(day)
  return month, after * 86400
end

-- A bucket is {at, limit, debt, refilled, returned}, a count {period, used}.
local counters, grown = {}, false
local function counter_of(field)
  if not counters[field] then
    local found = numbers(redis.call('HGET', KEYS[1], field))
    grown = grown or #found == 0
    if string.sub(field, -7) == '/minute' then
      if #found == 0 then found = {now, 0, 0, 0, 0} end
      local flow = math.max(0, now - found[1]) * found[2] / 60
      counters[field] = {now, found[2], math.max(0, found[3] - flow), found[4] + flow, found[5]}
    else
      if #found == 0 then found = {0, 0} end
      counters[field] = found
    end
  end
  return counters[field]
end
local function save()
  for field, values in pairs(counters) do
    local words = {}
    for _, value in ipairs(values) do words[#words + 1] = text(value) end
    redis.call('HSET', KEYS[1], field, table.concat(words, ' '))
  end
  for at = 1, 3 do redis.call('EXPIRE', KEYS[at], KEPT) end
end

-- End a reservation with what was used, by counter; an empty table gives everything back where ``all`` says so.
local function give_back(id, used, all)
  redis.call('ZREM', KEYS[3], id)
  local held = redis.call('HGET', KEYS[2], id)
  if not held then return end
  redis.call('HDEL', KEYS[2], id)
  for _, one in ipairs(cjson.decode(held)) do
    local field, amount = one[1], tonumber(one[3])
    local more = (all and 0 or used[one[2]] or amount) - amount
    local counter = counter_of(field)
    if #counter == 2 then
      if counter[1] == tonumber(one[4]) then counter[2] = counter[2] + more end
    else
      if more < 0 then
        local passed = counter[4] - tonumber(one[4])
        local reached = math.max(0, math.min(passed, counter[4] + counter[5] - tonumber(one[5])))
        more = -math.min(-more, math.max(0, amount - reached), counter[3])
        counter[5] = counter[5] - more
      end
      counter[3] = counter[3] + more
    end
  end
end
local function expire()
  local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now))
  for _, id in ipairs(ended) do give_back(id, {}, true) end
  return #ended > 0
end
"""

TAKE: Final = _SHARED + """
-- ARGV: then the seconds until the reservation expires, and of each charge: field, counter, window, limit, amount.
-- Answers whether it was taken, then of each counter what is used, seconds until it is new, seconds to wait.
local expired = expire()

-- Forget the counters that say nothing more: full buckets of which nothing is reserved, past days and months. Once
-- there are twice as many as the last sweep left, and one for each reservation: so each new one pays for a few looks.
local function sweep()
  local size, left = redis.call('HLEN', KEYS[1]), tonumber(redis.call('HGET', KEYS[1], 'left') or 0)
  if size < 64 + redis.call('HLEN', KEYS[2]) + 2 * left then return end
  local held = {}
  for _, words in ipairs(redis.call('HVALS', KEYS[2])) do
    for _, one in ipairs(cjson.decode(words)) do held[one[1]] = true end
  end
  local all = redis.call('HGETALL', KEYS[1])
  for at = 1, #all, 2 do
    local values, window, spent = numbers(all[at + 1]), string.match(all[at], '/(%a+)$'), false
    if window == 'minute' then
      spent = not held[all[at]] and values[3] <= math.max(0, now - values[1]) * values[2] / 60
    elseif window then
      spent = values[1] < period_of(window)
    end
    if spent then
      redis.call('HDEL', KEYS[1], all[at])
      size = size - 1
    end
  end
  redis.call('HSET', KEYS[1], 'left', size)
end
local function state(at)
  local window, limit, amount = ARGV[at + 2], tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local counter = counter_of(ARGV[at])
  if window == 'minute' then
    local rate = math.max(limit, TOLERANCE) / 60
    local over = counter[3] + amount - limit
    return math.ceil(counter[3] - TOLERANCE), counter[3] / rate, over > TOLERANCE and over / rate or 0
  end
  local period, ends_at = period_of(window)
  local used = counter[1] == period and counter[2] or 0
  return used, ends_at - now, used + amount > limit and ends_at - now or 0
end
local function states(taken)
  local told = {taken}
  for at = 4, #ARGV, 5 do
    local used, reset, wait = state(at)
    told[#told + 1] = text(used)
    told[#told + 1] = text(reset)
    told[#told + 1] = text(taken == 1 and 0 or wait)
  end
  return told
end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
  for at = 4, #ARGV, 5 do
    local _, _, wait = state(at)
    if wait > 0 then
      local told = states(0)
      if expired then save() end
      return told
    end
  end
  local held = {}
  for at = 4, #ARGV, 5 do
    local limit, amount, counter = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4]), counter_of(ARGV[at])
    if ARGV[at + 2] == 'minute' then
      held[#held + 1] = {ARGV[at], ARGV[at + 1], ARGV[at + 4], text(counter[4]),
                         text(counter[4] + counter[5] + counter[3])}
      counter[2], counter[3] = limit, counter[3] + amount
    else
      local period = period_of(ARGV[at + 2])
      held[#held + 1] = {ARGV[at], ARGV[at + 1], ARGV[at + 4], text(period)}
      counter[1], counter[2] = period, amount + (counter[1] == period and counter[2] or 0)
    end
  end
  redis.call('ZADD', KEYS[3], text(now + tonumber(ARGV[3])), ARGV[2])
  redis.call('HSET', KEYS[2], ARGV[2], cjson.encode(held))
  save()
  if grown then sweep() end
end
return states(1)
"""

SETTLE: Final = _SHARED + """
-- ARGV: then counters and what was used of each.
local used = {}
for at = 3, #ARGV, 2 do used[ARGV[at]] = tonumber(ARGV[at + 1]) end
expire()
give_back(ARGV[2], used, false)
save()
"""

RENEW: Final = _SHARED + """
-- ARGV: the seconds in place of the one id, then ids.
if expire() then save() end
for at = 3, #ARGV do redis.call('ZADD', KEYS[3], 'XX', text(now + tonumber(ARGV[2])), ARGV[at]) end
for at = 1, 3 do redis.call('EXPIRE', KEYS[at], KEPT) end
"""

ANNOUNCE: Final = _CLOCK + """
-- KEYS: the replicas by the time until which they live. ARGV: then a replica, and the seconds that it lives on.
-- Answers how many live.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now))
if tonumber(ARGV[3]) > 0 then
  redis.call('ZADD', KEYS[1], text(now + tonumber(ARGV[3])), ARGV[2])
  redis.call('EXPIRE', KEYS[1], math.ceil(tonumber(ARGV[3])))
else
  redis.call('ZREM', KEYS[1], ARGV[2])
end
return redis.call('ZCARD', KEYS[1])
"""
