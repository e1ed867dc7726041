-- claim: a worker takes jobs; each gets a new fencing token and a new attempt.
--
-- Ids given by name lie in the worker's list already: one that BLMOVE brought,
-- or one whose claim reply was lost. The latter gets a new token but is not
-- charged another attempt. Ids that may not run (cancelled meanwhile, gone)
-- only leave the list, and an id by name that is not in the list was settled
-- meanwhile: claiming it would leave a running job that no list holds.
--
-- KEYS  1 wait (list)  2 the worker's active (list)  3 workers (zset)  4 failed (list)
-- ARGV  1 base of all keys  2 worker  3 how many to take from wait
--       4 life of a failed record (s)  5.. ids by name
-- Returns 'fenced' if the worker was declared dead, else a list of {id, job hash
--       (field, value, ...)}; a record whose counters are damaged is buried, its hash is empty
-- Publishes each claimed job.
local wait, active, workers, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local base, worker, count = ARGV[1], ARGV[2], tonumber(ARGV[3])

local lease_end = redis.call('ZSCORE', workers, worker)
if not lease_end or tonumber(lease_end) <= 0 then return 'fenced' end

local now, claimed = clock(), {}
local function counter(text)
  return text and string.match(text, '^%d+$') and #text < 16
end

local function take(id, by_name)
  if by_name and not redis.call('LPOS', active, id) then return end
  local job = base .. 'job:' .. id
  local f = redis.call('HMGET', job, 'status', 'worker', 'attempts', 'token', 'version')
  local runs = f[1] == 'queued' or (by_name and f[1] == 'processing' and f[2] == worker)
  if not runs then
    redis.call('LREM', active, -1, id)
    return
  end
  if not (counter(f[3]) and counter(f[4]) and counter(f[5])) then
    -- HINCRBY would end this script in the middle, for this worker and for every next one.
    redis.call('LREM', active, -1, id)
    redis.call('HSET', job, 'status', 'failed')
    redis.call('LPUSH', failed, id)
    redis.call('EXPIRE', job, ARGV[4])
    claimed[#claimed + 1] = {id, {}}
    return
  end
  if f[1] == 'queued' then
    redis.call('HINCRBY', job, 'attempts', 1)
  end
  redis.call('HINCRBY', job, 'token', 1)
  redis.call('HSETNX', job, 'started_at', now)
  redis.call('HDEL', job, 'due_at')
  redis.call('HSET', job, 'status', 'processing', 'worker', worker, 'attempt_started_at', now, 'stage', 'planning',
    'message', 'Looking up the files', 'progress', 0, 'current_file', 0, 'bytes_done', 0, 'bytes_total', 0)
  publish(job, now)
  claimed[#claimed + 1] = {id, redis.call('HGETALL', job)}
end

for i = 5, #ARGV do take(ARGV[i], true) end
while #claimed < count do
  local id = redis.call('LMOVE', wait, active, 'RIGHT', 'LEFT')
  if not id then break end
  take(id, false)
end
return claimed
