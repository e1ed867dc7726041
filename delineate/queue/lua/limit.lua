-- limit: one request of a caller is counted against its rate (GCRA).
--
-- The key holds the "theoretical arrival time": the moment (ms) at which the
-- caller's burst is used up no more. One number, one round trip, no window edges.
-- Source: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm (virtual scheduling)
--
-- KEYS  1 the caller's state (string)
-- ARGV  1 requests per window  2 window (ms)
-- Returns {1 allowed or 0, requests left, ms until the limit is whole again, ms until the next one is allowed}
-- Publishes nothing.
local state = KEYS[1]
local requests, window = tonumber(ARGV[1]), tonumber(ARGV[2])

local now, interval = clock(), window / requests
local arrival = math.max(tonumber(redis.call('GET', state) or 0), now)
local wait = arrival + interval - window - now
if wait > 0 then return {0, 0, math.ceil(arrival - now), math.ceil(wait)} end
arrival = arrival + interval
redis.call('SET', state, arrival, 'PX', math.max(1, math.ceil(arrival - now)))
return {1, math.floor((window - (arrival - now)) / interval), math.ceil(arrival - now), 0}
