-- requeue: a failed or cancelled job starts over, behind its user's other jobs.
--
-- KEYS  1 job (hash)  2 failed (list)
-- ARGV  1 id  2 base of all keys  3 most jobs that may wait  4 nonce of this call, so that it can be repeated
-- Returns 'requeued', 'missing', 'full', or the status that does not allow it
-- Publishes the job.
local job, failed = KEYS[1], KEYS[2]
local id, base, nonce = ARGV[1], ARGV[2], ARGV[4]

local f = redis.call('HMGET', job, 'status', 'requeue', 'user')
local status = f[1]
if not status or status == 'withdrawn' then return 'missing' end
if f[2] == nonce then return 'requeued' end
if status ~= 'failed' and status ~= 'cancelled' then return status end
if count_waiting(base) >= tonumber(ARGV[3]) then return 'full' end
if status == 'failed' then redis.call('LREM', failed, 1, id) end
redis.call('PERSIST', job)
set_waiting(job, 'Waiting for a worker')
local place = digits(clock_us())
redis.call('HSET', job, 'requeue', nonce, 'place', place, 'attempts', 0, 'crashes', 0, 'bytes_total', 0)
redis.call('HDEL', job, 'error', 'started_at', 'completed_at')
join_line(base, f[3], id, place)
publish(job, clock())
return 'requeued'
