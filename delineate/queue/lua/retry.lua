-- retry: the attempt failed, another one is due after a delay.
--
-- KEYS  1 job (hash)  2 the worker's active (list)  3 delayed (zset)
-- ARGV  1 id  2 token  3 delay (ms)  4 failure (JSON)  5 message
-- Returns 1 done, 2 done before by this very lease, 0 refused: the token is old
-- Publishes the job.
local job, active, delayed = KEYS[1], KEYS[2], KEYS[3]
local id, token = ARGV[1], ARGV[2]

local state = lease_state(job, token)
if state == 'queued' then return 2 end
if state ~= 'held' then return 0 end
local now = clock()
local due = now + math.floor(tonumber(ARGV[3]))
set_waiting(job, ARGV[5])
redis.call('HSET', job, 'error', ARGV[4], 'due_at', digits(due))
redis.call('LREM', active, -1, id)
redis.call('ZADD', delayed, due, id)
publish(job, now)
return 1
