-- promote: delayed jobs whose time has come are next in line.
--
-- KEYS  1 delayed (zset)  2 wait (list)
-- ARGV  1 base of all keys  2 how many at most
-- Returns the number of promoted jobs
-- Publishes nothing: to its user the job is still waiting.
local delayed, wait = KEYS[1], KEYS[2]
local base = ARGV[1]

local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', clock(), 'LIMIT', 0, ARGV[2])
-- The last one pushed is claimed first, and that must be the one due longest.
for i = #due, 1, -1 do
  redis.call('ZREM', delayed, due[i])
  if redis.call('HGET', base .. 'job:' .. due[i], 'status') == 'queued' then
    redis.call('HDEL', base .. 'job:' .. due[i], 'due_at')
    redis.call('RPUSH', wait, due[i])
  end
end
return #due
