-- progress: the lease's holder says how far it is; numbers never go back.
--
-- KEYS  1 job (hash)
-- ARGV  1 token  2 percent (0-99)  3 finished files  4 stage  5 message  6 bytes done  7 bytes in all
-- Returns 1 taken, 0 refused: the token is old
-- Publishes the job.
local job = KEYS[1]
local token, percent, files, bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[6])

if lease_state(job, token) ~= 'held' then return 0 end
local f = redis.call('HMGET', job, 'progress', 'current_file', 'bytes_done')
redis.call('HSET', job, 'progress', math.max(percent, tonumber(f[1])), 'current_file',
  math.max(files, tonumber(f[2])), 'stage', ARGV[4], 'message', ARGV[5],
  'bytes_done', math.max(bytes, tonumber(f[3])), 'bytes_total', ARGV[7])
publish(job, clock())
return 1
