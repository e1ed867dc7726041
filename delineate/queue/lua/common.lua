-- Put in front of every transition by scripts.py: the clock and the event.

-- By the clock of Redis: the clocks of workers need not agree. Unix microseconds.
local function clock_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Unix milliseconds.
local function clock()
  return math.floor(clock_us() / 1000)
end

-- Give the job its next version and tell whoever follows it. The channel has
-- the name of the job's key. Events carry no file ids and no result: the final
-- event is small too, and its readers fetch the job once.
local function publish(job, now)
  redis.call('HINCRBY', job, 'version', 1)
  redis.call('HSET', job, 'updated_at', now)
  local f = redis.call('HMGET', job, 'version', 'status', 'progress', 'current_file', 'total_files',
    'stage', 'message', 'attempts', 'bytes_done', 'bytes_total')
  redis.call('PUBLISH', job, cjson.encode({
    version = tonumber(f[1]), status = f[2], progress = tonumber(f[3]), currentFile = tonumber(f[4]),
    totalFiles = tonumber(f[5]), stage = f[6], message = f[7], attempts = tonumber(f[8]),
    bytesDone = tonumber(f[9]), bytesTotal = tonumber(f[10]), updatedAt = now }))
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
    'completed_at', now)
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
