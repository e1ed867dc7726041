-- cancel: nobody works on the job any more, wherever it was.
--
-- The new token fences its worker out at once; the worker learns it from its
-- next heartbeat or progress report. Against finish one of the two wins.
--
-- KEYS  1 job (hash)  2 wait (list)  3 delayed (zset)
-- ARGV  1 id  2 base of all keys  3 life of the record (s)
-- Returns 'cancelled', 'already', 'finished' (too late) or 'missing'
-- Publishes the job.
local job, wait, delayed = KEYS[1], KEYS[2], KEYS[3]
local id, base = ARGV[1], ARGV[2]

local f = redis.call('HMGET', job, 'status', 'worker')
local status = f[1]
if not status or status == 'withdrawn' then return 'missing' end
if status == 'cancelled' then return 'already' end
if status == 'processing' then
  redis.call('LREM', base .. 'queue:active:' .. f[2], -1, id)
elseif status == 'queued' then
  -- A job that BLMOVE took but nobody claimed yet is in neither; claim drops it.
  if redis.call('LREM', wait, -1, id) == 0 then redis.call('ZREM', delayed, id) end
else
  return 'finished'
end
local now = clock()
abandon_upload(job, base .. 'queue:abandoned', now)
redis.call('HINCRBY', job, 'token', 1)
redis.call('HSET', job, 'status', 'cancelled', 'stage', 'done', 'message', 'Cancelled', 'worker', '',
  'completed_at', now)
redis.call('HDEL', job, 'due_at', 'error')
redis.call('EXPIRE', job, ARGV[3])
publish(job, now)
return 'cancelled'
