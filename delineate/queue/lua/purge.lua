-- purge: an ended job is forgotten before its time.
--
-- KEYS  1 job (hash)  2 failed (list)
-- ARGV  1 id  2 base of all keys
-- Returns 'purged', 'missing', or the status that does not allow it
-- Publishes nothing: who still follows the job finds it gone.
local job, failed = KEYS[1], KEYS[2]
local id, base = ARGV[1], ARGV[2]

local f = redis.call('HMGET', job, 'status', 'user')
local status = f[1]
if not status or status == 'withdrawn' then return 'missing' end
if status == 'queued' or status == 'processing' then return status end
if status == 'failed' then redis.call('LREM', failed, 1, id) end
redis.call('ZREM', base .. 'user:' .. (f[2] or '') .. ':jobs', id)
redis.call('DEL', job)
return 'purged'
