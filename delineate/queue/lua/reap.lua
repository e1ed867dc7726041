-- reap: the jobs of dead workers go back to the front of the line.
--
-- Run by every worker; there is no leader and no lock, because it is one
-- script. A crash charges no attempt but counts for itself: a job that loses
-- its worker too often is buried. A dead worker is remembered for a while and
-- its list is looked at again, since a late BLMOVE can still land there.
--
-- KEYS  1 workers (zset)  2 wait (list)  3 failed (list)
-- ARGV  1 base of all keys  2 most crashes of a job  3 life of a failed record (s)
--       4 how many jobs at most  5 how long dead workers are remembered (ms)
--       6 failure for a poison job (JSON)  7 message for a poison job
-- Returns a flat list: worker, job id, 'requeued' or 'buried', and of the attempt that was lost: traceparent, span id
--       and when it began (ms), all three '' if it is not traced
-- Publishes each job that was being processed.
local workers, wait, failed = KEYS[1], KEYS[2], KEYS[3]
local base, max_crashes, left = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local now, moved = clock(), {}

-- Of a trace only what is of this very lease, which a worker that records nothing gives no span, and nothing damaged.
local function report(worker, id, outcome, traceparent, span, began, of_lease)
  local whole = of_lease and #traceparent == 55 and string.find(traceparent, '^[%x-]+$')
    and #span == 16 and string.find(span, '^%x+$') and #began <= 13 and string.find(began, '^%d+$')
  local trace = whole and {traceparent, span, began} or {'', '', ''}
  for _, value in ipairs({worker, id, outcome, trace[1], trace[2], trace[3]}) do moved[#moved + 1] = value end
end

local function reap_job(worker, id)
  local job = base .. 'job:' .. id
  local f = redis.call('HMGET', job, 'status', 'worker', 'traceparent', 'span', 'attempt_started_at', 'span_token', 'token')
  local of_lease = f[3] and f[4] and f[5] and f[6] == f[7]
  if f[1] == 'queued' then
    -- Moved by BLMOVE but never claimed: nothing was lost, nothing is charged.
    redis.call('RPUSH', wait, id)
    report(worker, id, 'requeued')
  elseif f[1] == 'processing' and f[2] == worker then
    redis.call('HINCRBY', job, 'token', 1)
    if redis.call('HINCRBY', job, 'crashes', 1) > max_crashes then
      set_failed(job, failed, base .. 'queue:abandoned', id, ARGV[6], ARGV[7], now, ARGV[3])
      report(worker, id, 'buried', f[3], f[4], f[5], of_lease)
      return
    end
    redis.call('HINCRBY', job, 'attempts', -1)
    set_waiting(job, 'The worker was lost; waiting for another')
    redis.call('RPUSH', wait, id)
    publish(job, now)
    report(worker, id, 'requeued', f[3], f[4], f[5], of_lease)
  end
end

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', workers, '(0', now)) do
  redis.call('ZADD', workers, -now, worker)
end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', '(0')) do
  local active = base .. 'queue:active:' .. worker
  while left > 0 do
    local id = redis.call('LPOP', active)
    if not id then break end
    left = left - 1
    reap_job(worker, id)
  end
  local died = -tonumber(redis.call('ZSCORE', workers, worker))
  if redis.call('LLEN', active) == 0 and now - died > tonumber(ARGV[5]) then redis.call('ZREM', workers, worker) end
end
return moved
