-- bury: the job failed for good and becomes a dead letter.
--
-- KEYS  1 job (hash)  2 the worker's active (list)  3 failed (list)  4 abandoned (zset)
-- ARGV  1 id  2 token  3 failure (JSON)  4 message  5 life of the record (s)
-- Returns 1 done, 2 done before by this very lease, 0 refused: the token is old
-- Publishes the job.
local job, active, failed, abandoned = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, token = ARGV[1], ARGV[2]

local state = lease_state(job, token)
if state == 'failed' then return 2 end
if state ~= 'held' then return 0 end
redis.call('LREM', active, -1, id)
set_failed(job, failed, abandoned, id, ARGV[3], ARGV[4], clock(), ARGV[5])
return 1
