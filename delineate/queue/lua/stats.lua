-- stats: one consistent look at the whole queue.
--
-- KEYS  1 wait (list)  2 backlog (zset)  3 delayed (zset)  4 failed (list)  5 workers (zset)  6 paused (string)
-- ARGV  1 base of all keys
-- Returns {waiting, active, delayed, failed, live workers, paused (1 or 0),
--       ms that the oldest waiting job has waited for (0 if there is none)}
-- Publishes nothing.
local wait, backlog, delayed, failed, workers, paused = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local base = ARGV[1]

local active, now_us = 0, clock_us()
for _, worker in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  active = active + redis.call('LLEN', base .. 'queue:active:' .. worker)
end

local oldest = now_us
local function look(id)
  local place = id and redis.call('HGET', base .. 'job:' .. id, 'place')
  if place then oldest = math.min(oldest, tonumber(place) or now_us) end
end
look(redis.call('LINDEX', wait, -1))
look(redis.call('ZRANGE', backlog, 0, 0)[1])

return {redis.call('LLEN', wait) + redis.call('ZCARD', backlog), active, redis.call('ZCARD', delayed),
  redis.call('LLEN', failed), redis.call('ZCOUNT', workers, math.floor(now_us / 1000), '+inf'),
  redis.call('EXISTS', paused), math.floor((now_us - oldest) / 1000)}
