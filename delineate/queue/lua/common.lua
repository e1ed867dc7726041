-- Put in front of every transition by scripts.py: the clock, the event, the line.

-- By the clock of Redis: the clocks of workers need not agree. Unix microseconds.
local function clock_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Unix milliseconds.
local function clock()
  return math.floor(clock_us() / 1000)
end

-- All digits of a large whole number; `..` would write it as 1.8e+15.
local function digits(number)
  return string.format('%.0f', number)
end

-- Give the job its next version and tell whoever follows it. The channel has
-- the name of the job's key. Events carry no file ids and no result: the final
-- event is small too, and its readers fetch the job once. The version is a time,
-- so that it still rises when a failover to a replica has lost the latest changes.
local function publish(job, now)
  local version = math.max(tonumber(redis.call('HGET', job, 'version')) + 1, now)
  redis.call('HSET', job, 'version', digits(version), 'updated_at', digits(now))
  local f = redis.call('HMGET', job, 'version', 'status', 'progress', 'current_file', 'total_files',
    'stage', 'message', 'attempts', 'bytes_done', 'bytes_total')
  redis.call('PUBLISH', job, cjson.encode({
    version = tonumber(f[1]), status = f[2], progress = tonumber(f[3]), currentFile = tonumber(f[4]),
    totalFiles = tonumber(f[5]), stage = f[6], message = f[7], attempts = tonumber(f[8]),
    bytesDone = tonumber(f[9]), bytesTotal = tonumber(f[10]), updatedAt = now }))
end

-- A new fencing token, higher than any before. A time too: after a failover that
-- lost a claim, the next claim must not get the same token once more.
local function new_token(job)
  local token = math.max(tonumber(redis.call('HGET', job, 'token')) + 1, clock_us())
  redis.call('HSET', job, 'token', digits(token))
end

-- The line, fair between users: each has one turn, a place in the wait list. Its
-- other jobs wait behind that in a zset of the user's own, by their place (us), and
-- in the backlog, which has those of all users. Whoever takes the job that has the
-- turn gives the turn to the user's next one, at the end of the list. Jobs that
-- were interrupted go to the front of the list beside all this.
local function give_turn(base, user, id)
  redis.call('HSET', base .. 'queue:turns', user, id)
  redis.call('LPUSH', base .. 'queue:wait', id)
end

local function pass_turn(base, user)
  local id = redis.call('ZPOPMIN', base .. 'user:' .. user .. ':waiting')[1]
  if id then
    redis.call('ZREM', base .. 'queue:backlog', id)
    give_turn(base, user, id)
  else
    redis.call('HDEL', base .. 'queue:turns', user)
  end
end

-- Whether the user's turn is with a job that can use it; damaged records apart, it always is.
local function has_turn(base, user)
  local id = redis.call('HGET', base .. 'queue:turns', user)
  return id and redis.call('HGET', base .. 'job:' .. id, 'status') == 'queued'
end

local function join_line(base, user, id, place)
  local waiting, turn = base .. 'user:' .. user .. ':waiting', has_turn(base, user)
  if not turn and redis.call('EXISTS', waiting) == 0 then return give_turn(base, user, id) end
  redis.call('ZADD', waiting, place, id)
  redis.call('ZADD', base .. 'queue:backlog', place, id)
  if not turn then pass_turn(base, user) end
end

-- The job no longer waits, wherever it stood.
local function leave_line(base, user, id)
  if redis.call('ZREM', base .. 'user:' .. user .. ':waiting', id) == 1 then
    redis.call('ZREM', base .. 'queue:backlog', id)
  elseif redis.call('LREM', base .. 'queue:wait', -1, id) == 0
    and redis.call('ZREM', base .. 'queue:delayed', id) == 0 then
    -- BLMOVE took it, but nobody has claimed it yet.
    for _, worker in ipairs(redis.call('ZRANGE', base .. 'queue:workers', 0, -1)) do
      redis.call('LREM', base .. 'queue:active:' .. worker, -1, id)
    end
  end
  if redis.call('HGET', base .. 'queue:turns', user) == id then pass_turn(base, user) end
end

-- How many jobs wait for a worker or for their next attempt.
local function count_waiting(base)
  return redis.call('LLEN', base .. 'queue:wait') + redis.call('ZCARD', base .. 'queue:backlog')
    + redis.call('ZCARD', base .. 'queue:delayed')
end

-- Back to waiting, without a worker; progress belongs to an attempt and starts again.
local function set_waiting(job, message)
  redis.call('HSET', job, 'status', 'queued', 'stage', 'waiting', 'message', message, 'worker', '',
    'progress', 0, 'current_file', 0, 'bytes_done', 0)
end

-- The job's upload will not be finished by anybody: have a janitor abort it.
-- Its parts are in the key beside the job's.
local function abandon_upload(job, abandoned, now)
  local upload = redis.call('HGET', job, 'upload')
  if not upload then return end
  redis.call('ZADD', abandoned, now, upload)
  redis.call('HDEL', job, 'upload')
  redis.call('DEL', job .. ':parts')
end

-- The one place where a job becomes failed; its dead letter stands newest at the left.
local function set_failed(job, failed, abandoned, id, failure, message, now, ttl)
  abandon_upload(job, abandoned, now)
  redis.call('HSET', job, 'status', 'failed', 'stage', 'done', 'error', failure, 'message', message,
    'completed_at', digits(now))
  redis.call('LPUSH', failed, id)
  redis.call('EXPIRE', job, ttl)
  publish(job, now)
end

-- 'held' if `token` is the processing job's own, otherwise the job's status ('' if it is gone).
local function lease_state(job, token)
  local f = redis.call('HMGET', job, 'status', 'token')
  if f[2] ~= token then return 'refused' end
  if f[1] == 'processing' then return 'held' end
  return f[1] or ''
end
