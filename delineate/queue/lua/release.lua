-- release: a worker hands a job back unharmed; it is next in line and no attempt is charged.
--
-- KEYS  1 job (hash)  2 the worker's active (list)  3 wait (list)
-- ARGV  1 id  2 token
-- Returns 1 done, 2 done before by this very lease, 0 refused: the token is old
-- Publishes the job.
local job, active, wait = KEYS[1], KEYS[2], KEYS[3]
local id, token = ARGV[1], ARGV[2]

local state = lease_state(job, token)
if state == 'queued' then return 2 end
if state ~= 'held' then return 0 end
set_waiting(job, 'Waiting for a worker')
redis.call('HINCRBY', job, 'attempts', -1)
redis.call('LREM', active, -1, id)
redis.call('RPUSH', wait, id)
publish(job, clock())
return 1
