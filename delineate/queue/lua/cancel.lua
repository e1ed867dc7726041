-- cancel: nobody works on the job any more, wherever it was.
--
-- The new token fences its worker out at once; a message on the worker's channel
-- makes it look at its leases. Against finish one of the two wins.
--
-- KEYS  1 job (hash)
-- ARGV  1 id  2 base of all keys  3 life of the record (s)
-- Returns 'cancelled', 'already', 'finished' (too late) or 'missing'
-- Publishes the job, and an empty message for its worker.
local job = KEYS[1]
local id, base = ARGV[1], ARGV[2]

local f = redis.call('HMGET', job, 'status', 'worker', 'user')
local status = f[1]
if not status or status == 'withdrawn' then return 'missing' end
if status == 'cancelled' then return 'already' end
if status == 'processing' then
  redis.call('LREM', base .. 'queue:active:' .. f[2], -1, id)
  redis.call('PUBLISH', base .. 'worker:' .. f[2], '')
elseif status == 'queued' then
  leave_line(base, f[3], id)
else
  return 'finished'
end
local now = clock()
abandon_upload(job, base .. 'queue:abandoned', now)
redis.call('HINCRBY', job, 'token', 1)
redis.call('HSET', job, 'status', 'cancelled', 'stage', 'done', 'message', 'Cancelled', 'worker', '',
  'completed_at', digits(now))
redis.call('HDEL', job, 'due_at', 'error')
redis.call('EXPIRE', job, ARGV[3])
publish(job, now)
return 'cancelled'
