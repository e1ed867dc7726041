-- promote: delayed jobs whose time has come wait in line again, each in its old place among its user's.
--
-- KEYS  1 delayed (zset)
-- ARGV  1 base of all keys  2 how many at most
-- Returns the number of promoted jobs
-- Publishes nothing: to its user the job is still waiting.
local delayed = KEYS[1]
local base = ARGV[1]

local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', clock(), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(due) do
  redis.call('ZREM', delayed, id)
  local job = base .. 'job:' .. id
  local f = redis.call('HMGET', job, 'status', 'user', 'place')
  if f[1] == 'queued' then
    redis.call('HDEL', job, 'due_at')
    join_line(base, f[2], id, f[3])
  end
end
return #due
