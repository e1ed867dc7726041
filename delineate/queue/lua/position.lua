-- position: a waiting job's place in line, 1 is next.
--
-- Exact in the wait list. Behind its user's turn it is an upper bound: every
-- round of the line takes one job of each user, and users leave the line as
-- their jobs are done.
--
-- KEYS  1 job (hash)  2 wait (list)  3 backlog (zset)  4 turns (hash)
-- ARGV  1 id  2 base of all keys
-- Returns the place, or nil for a job that is not in line
-- Publishes nothing.
local job, wait, backlog, turns = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, base = ARGV[1], ARGV[2]

local length = redis.call('LLEN', wait)
local function place_of(listed)
  local index = listed and redis.call('LPOS', wait, listed, 'RANK', -1)
  return index and length - index
end

local place = place_of(id)
if place then return place end
local user = redis.call('HGET', job, 'user')
local behind = user and redis.call('ZRANK', base .. 'user:' .. user .. ':waiting', id)
if not behind then return nil end
-- A turn that BLMOVE has just taken is in no list; its user is as good as first.
local turn = place_of(redis.call('HGET', turns, user)) or 0
return math.min(turn + (behind + 1) * math.max(length, 1), length + redis.call('ZCARD', backlog))
