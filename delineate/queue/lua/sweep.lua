-- sweep: dead letters whose job record has ended leave the list.
--
-- KEYS  1 failed (list)
-- ARGV  1 base of all keys  2 how many at most
-- Returns the number of dead letters that left
-- Publishes nothing.
local failed = KEYS[1]

local gone = 0
-- The oldest is at the right, and records end in the order they were buried.
while gone < tonumber(ARGV[2]) do
  local id = redis.call('LINDEX', failed, -1)
  if not id or redis.call('EXISTS', ARGV[1] .. 'job:' .. id) == 1 then break end
  redis.call('RPOP', failed)
  gone = gone + 1
end
return gone
