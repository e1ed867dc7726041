-- begin_upload: the lease's holder has started an upload; an earlier one of the job is given up.
--
-- KEYS  1 job (hash)  2 abandoned (zset)
-- ARGV  1 token  2 upload (JSON)
-- Returns 1 recorded, 0 refused: the token is old
-- Publishes nothing.
local job, abandoned = KEYS[1], KEYS[2]
local token, upload = ARGV[1], ARGV[2]

if lease_state(job, token) ~= 'held' then return 0 end
if redis.call('HGET', job, 'upload') == upload then return 1 end
abandon_upload(job, abandoned, clock())
redis.call('HSET', job, 'upload', upload)
return 1
