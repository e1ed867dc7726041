-- heartbeat: a worker lives, and learns which of its leases are gone.
--
-- KEYS  1 workers (zset)
-- ARGV  1 base of all keys  2 worker  3 life of the lease (ms)  4 '1' registers a new worker
--       5.. id, token, id, token, ... of the leases it believes to hold
-- Returns 'fenced' if the worker was declared dead, else a flat list of the lost ones: id, token, ...
-- Publishes nothing.
local workers = KEYS[1]
local base, worker = ARGV[1], ARGV[2]

local lease_end = redis.call('ZSCORE', workers, worker)
if ARGV[4] ~= '1' and (not lease_end or tonumber(lease_end) <= 0) then return 'fenced' end
redis.call('ZADD', workers, clock() + ARGV[3], worker)
local lost = {}
for i = 5, #ARGV, 2 do
  if lease_state(base .. 'job:' .. ARGV[i], ARGV[i + 1]) ~= 'held' then
    lost[#lost + 1] = ARGV[i]
    lost[#lost + 1] = ARGV[i + 1]
  end
end
return lost
