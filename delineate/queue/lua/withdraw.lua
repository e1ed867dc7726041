-- withdraw: a job whose acceptance could not be confirmed never runs.
--
-- The client was told 503. A tombstone stands in the job's place for a while,
-- because the enqueue itself may still sit in a socket's buffer and come later.
-- A job that was given to a client meanwhile, for its idempotency key, stays.
--
-- KEYS  1 job (hash)  2 the user's jobs (zset)  3 idempotency record (string)
-- ARGV  1 id  2 user  3 base of all keys  4 life of the tombstone (s)
-- Returns 1 if a job was taken back, 0 if there was none
-- Publishes nothing.
local job, user_jobs, idem = KEYS[1], KEYS[2], KEYS[3]
local id, user, base = ARGV[1], ARGV[2], ARGV[3]

local f = redis.call('HMGET', job, 'status', 'worker', 'confirmed')
if f[3] then return 0 end
local existed = f[1] and f[1] ~= 'withdrawn'
if f[1] == 'failed' then redis.call('LREM', base .. 'queue:failed', 1, id) end
if f[1] == 'processing' then redis.call('LREM', base .. 'queue:active:' .. f[2], 1, id) end
if existed then
  abandon_upload(job, base .. 'queue:abandoned', clock())
  redis.call('ZREM', user_jobs, id)
  local record = redis.call('GET', idem)
  if record and string.sub(record, -#id) == id then redis.call('DEL', idem) end
end
redis.call('DEL', job)
redis.call('HSET', job, 'status', 'withdrawn')
redis.call('EXPIRE', job, ARGV[4])
if f[1] == 'queued' then leave_line(base, user, id) end
return existed and 1 or 0
