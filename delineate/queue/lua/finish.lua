-- finish: the archive is published; only the current lease can do it.
--
-- KEYS  1 job (hash)  2 the worker's active (list)
-- ARGV  1 id  2 token  3 result (JSON)  4 message  5 life of the record (s)
-- Returns 1 done, 2 done before by this very lease, 0 refused: the token is old
-- Publishes the job.
local job, active = KEYS[1], KEYS[2]
local id, token = ARGV[1], ARGV[2]

local state = lease_state(job, token)
if state == 'completed' then return 2 end
if state ~= 'held' then return 0 end
local now = clock()
redis.call('HSET', job, 'status', 'completed', 'stage', 'done', 'message', ARGV[4], 'result', ARGV[3],
  'completed_at', digits(now), 'progress', 100, 'current_file', redis.call('HGET', job, 'total_files'),
  'bytes_done', redis.call('HGET', job, 'bytes_total'))
redis.call('HDEL', job, 'error', 'upload')
redis.call('DEL', job .. ':parts')
redis.call('LREM', active, -1, id)
redis.call('EXPIRE', job, ARGV[5])
publish(job, now)
return 1
