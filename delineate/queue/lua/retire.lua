-- retire: a worker leaves; whatever is still in its list is handed back uncharged.
--
-- It stays among the dead for a while, since a late BLMOVE can still land in its list.
--
-- KEYS  1 workers (zset)  2 the worker's active (list)  3 wait (list)
-- ARGV  1 base of all keys  2 worker
-- Returns the ids handed back
-- Publishes each job that was being processed.
local workers, active, wait = KEYS[1], KEYS[2], KEYS[3]
local base, worker = ARGV[1], ARGV[2]

local now, handed_back = clock(), {}
while true do
  local id = redis.call('LPOP', active)
  if not id then break end
  local job = base .. 'job:' .. id
  local f = redis.call('HMGET', job, 'status', 'worker')
  if f[1] == 'processing' and f[2] == worker then
    redis.call('HINCRBY', job, 'token', 1)
    redis.call('HINCRBY', job, 'attempts', -1)
    set_waiting(job, 'Waiting for a worker')
    publish(job, now)
    f[1] = 'queued'
  end
  if f[1] == 'queued' then
    redis.call('RPUSH', wait, id)
    handed_back[#handed_back + 1] = id
  end
end
redis.call('ZADD', workers, -now, worker)
return handed_back
