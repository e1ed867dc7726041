-- save_part: the store has a part; an attempt after a crash need not send it again.
--
-- KEYS  1 job (hash)  2 parts (hash)
-- ARGV  1 token  2 part number  3 part (JSON)
-- Returns 1 recorded, 0 refused: the token is old
-- Publishes nothing.
local job, parts = KEYS[1], KEYS[2]
local token = ARGV[1]

if lease_state(job, token) ~= 'held' then return 0 end
redis.call('HSET', parts, ARGV[2], ARGV[3])
return 1
