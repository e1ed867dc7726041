-- enqueue: a new job is accepted, or one is returned that was accepted before.
--
-- KEYS  1 job (hash)  2 the user's jobs (zset)  3 the user's waiting jobs (zset)  4 idempotency record (string)
-- ARGV  1 id  2 user  3 file ids (JSON)  4 number of files  5 on_missing
--       6 fingerprint of what was asked  7 traceparent  8 request id
--       9 most jobs that may wait  10 most of one user  11 life of the user's list (s)
--       12 most entries in it  13 life of the idempotency record (s), 0 without one  14 base of all keys
-- Returns {outcome, the job's hash (field, value, ...)}: 'accepted'; 'known' - this id is here already (the
--       reply was lost and the call repeated); 'withdrawn' - this id was given
--       up before; 'replayed' - the idempotency key belongs to that other job;
--       'conflict' - the key came with another fingerprint; 'full'; 'user_full'
-- Publishes nothing: nobody can know the id yet.
local job, user_jobs, waiting, idem = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, user, fingerprint, idem_ttl, base = ARGV[1], ARGV[2], ARGV[6], tonumber(ARGV[13]), ARGV[14]

local status = redis.call('HGET', job, 'status')
if status == 'withdrawn' then return {'withdrawn', {}} end
if status then return {'known', redis.call('HGETALL', job)} end

if idem_ttl > 0 then
  local known = redis.call('GET', idem)
  if known then
    local separator = string.find(known, ' ', 1, true)
    local earlier = base .. 'job:' .. string.sub(known, separator + 1)
    if redis.call('EXISTS', earlier) == 1 then
      if string.sub(known, 1, separator - 1) ~= fingerprint then return {'conflict', {}} end
      -- From here on a client was told that this job is accepted, whatever another one was told.
      redis.call('HSET', earlier, 'confirmed', 1)
      return {'replayed', redis.call('HGETALL', earlier)}
    end
  end
end
if count_waiting(base) >= tonumber(ARGV[9]) then return {'full', {}} end
if redis.call('ZCARD', waiting) + 1 >= tonumber(ARGV[10]) and has_turn(base, user) then return {'user_full', {}} end

local now_us = clock_us()
local now = math.floor(now_us / 1000)
redis.call('HSET', job, 'id', id, 'user', user, 'status', 'queued', 'file_ids', ARGV[3], 'total_files', ARGV[4],
  'on_missing', ARGV[5], 'traceparent', ARGV[7], 'request_id', ARGV[8], 'progress', 0, 'current_file', 0,
  'bytes_done', 0, 'bytes_total', 0, 'stage', 'waiting', 'message', 'Waiting for a worker', 'attempts', 0,
  'crashes', 0, 'token', 0, 'version', digits(now), 'worker', '', 'created_at', digits(now), 'updated_at', digits(now),
  'place', digits(now_us))
-- Microseconds, so that jobs of one millisecond keep their order.
redis.call('ZADD', user_jobs, digits(now_us), id)
redis.call('ZREMRANGEBYSCORE', user_jobs, '-inf', digits(now_us - ARGV[11] * 1000000))
redis.call('ZREMRANGEBYRANK', user_jobs, 0, -1 - ARGV[12])
redis.call('EXPIRE', user_jobs, ARGV[11])
if idem_ttl > 0 then redis.call('SET', idem, fingerprint .. ' ' .. id, 'EX', idem_ttl) end
join_line(base, user, id, digits(now_us))
return {'accepted', redis.call('HGETALL', job)}
