-- stats: one consistent look at the whole queue.
--
-- KEYS  1 wait (list)  2 delayed (zset)  3 failed (list)  4 workers (zset)
-- ARGV  1 base of all keys
-- Returns {waiting, active, delayed, failed, live workers}
-- Publishes nothing.
local wait, delayed, failed, workers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local active = 0
for _, worker in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  active = active + redis.call('LLEN', ARGV[1] .. 'queue:active:' .. worker)
end
return {redis.call('LLEN', wait), active, redis.call('ZCARD', delayed), redis.call('LLEN', failed),
  redis.call('ZCOUNT', workers, clock(), '+inf')}
