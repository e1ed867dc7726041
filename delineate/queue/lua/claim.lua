-- claim: a worker takes jobs; each gets a new fencing token and a new attempt.
--
-- Ids given by name lie in the worker's list already: one that BLMOVE brought,
-- or one whose claim reply was lost. The latter gets a new token but is not
-- charged another attempt. Ids that may not run (cancelled meanwhile, gone)
-- only leave the list, and an id by name that is not in the list was settled
-- meanwhile: claiming it would leave a running job that no list holds.
--
-- A job whose trace is recorded gets a span id for this attempt, before anything can go wrong with it: a worker that
-- dies cannot tell its own. The one before it is kept, for the link from this attempt to that.
--
-- While the queue is paused, what only waits stays where it is, or goes back to the front of the line.
--
-- KEYS  1 wait (list)  2 the worker's active (list)  3 workers (zset)  4 failed (list)  5 paused (string)
-- ARGV  1 base of all keys  2 worker  3 how many to take from wait
--       4 life of a failed record (s)  5 13 hex digits that no other claim has, '' if the caller records nothing
--       6.. ids by name
-- Returns 'fenced' if the worker was declared dead, 'paused' if that is why there is nothing, else a list of {id, job hash
--       (field, value, ...)}; a record whose counters are damaged is buried, its hash is empty
-- Publishes each claimed job.
local wait, active, workers, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local base, worker, count, nonce = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[5]

local lease_end = redis.call('ZSCORE', workers, worker)
if not lease_end or tonumber(lease_end) <= 0 then return 'fenced' end

local now, claimed, paused = clock(), {}, redis.call('EXISTS', KEYS[5]) == 1
local function counter(text)
  return text and string.match(text, '^%d+$') and #text <= 16
end

local function take(id, by_name)
  if by_name and not redis.call('LPOS', active, id) then return end
  local job = base .. 'job:' .. id
  local f = redis.call('HMGET', job, 'status', 'worker', 'attempts', 'token', 'version', 'user', 'traceparent', 'span')
  if f[1] == 'queued' and paused then
    redis.call('LREM', active, -1, id)
    redis.call('RPUSH', wait, id)
    return
  end
  if f[6] and redis.call('HGET', base .. 'queue:turns', f[6]) == id then pass_turn(base, f[6]) end
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
  new_token(job)
  redis.call('HSETNX', job, 'started_at', digits(now))
  redis.call('HDEL', job, 'due_at')
  redis.call('HSET', job, 'status', 'processing', 'worker', worker, 'attempt_started_at', digits(now), 'stage', 'planning',
    'message', 'Looking up the files', 'progress', 0, 'current_file', 0, 'bytes_done', 0, 'bytes_total', 0)
  -- The last digit of a traceparent has the flag that says it is recorded.
  if nonce ~= '' and string.find(f[7] or '', '[13579bdf]$') then
    -- One that is claimed again because the reply was lost never ran: what it comes after is still the one before.
    if f[1] == 'queued' then redis.call('HSET', job, 'previous_span', f[8] or '') end
    redis.call('HSET', job, 'span', nonce .. string.format('%03x', #claimed), 'span_token', redis.call('HGET', job, 'token'))
  end
  publish(job, now)
  claimed[#claimed + 1] = {id, redis.call('HGETALL', job)}
end

for i = 6, #ARGV do take(ARGV[i], true) end
-- With nobody in the wait list no job stands back for its user's turn, which may be with a worker that just died.
local function from_backlog()
  local id = redis.call('ZPOPMIN', base .. 'queue:backlog')[1]
  if not id then return end
  redis.call('ZREM', base .. 'user:' .. (redis.call('HGET', base .. 'job:' .. id, 'user') or '') .. ':waiting', id)
  redis.call('LPUSH', active, id)
  return id
end

while #claimed < count and not paused do
  local id = redis.call('LMOVE', wait, active, 'RIGHT', 'LEFT') or from_backlog()
  if not id then break end
  take(id, false)
end
if paused and #claimed == 0 then return 'paused' end
return claimed
