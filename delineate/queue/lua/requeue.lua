-- requeue: a failed or cancelled job starts over, at the end of the line.
--
-- KEYS  1 job (hash)  2 wait (list)  3 delayed (zset)  4 failed (list)
-- ARGV  1 id  2 most jobs that may wait  3 nonce of this call, so that it can be repeated
-- Returns 'requeued', 'missing', 'full', or the status that does not allow it
-- Publishes the job.
local job, wait, delayed, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, nonce = ARGV[1], ARGV[3]

local f = redis.call('HMGET', job, 'status', 'requeue')
local status = f[1]
if not status or status == 'withdrawn' then return 'missing' end
if f[2] == nonce then return 'requeued' end
if status ~= 'failed' and status ~= 'cancelled' then return status end
if redis.call('LLEN', wait) + redis.call('ZCARD', delayed) >= tonumber(ARGV[2]) then return 'full' end
if status == 'failed' then redis.call('LREM', failed, 1, id) end
redis.call('PERSIST', job)
set_waiting(job, 'Waiting for a worker')
redis.call('HSET', job, 'requeue', nonce, 'attempts', 0, 'crashes', 0, 'bytes_total', 0)
redis.call('HDEL', job, 'error', 'started_at', 'completed_at')
redis.call('LPUSH', wait, id)
publish(job, clock())
return 'requeued'
